"""Examples: what a random instrument makes of random samples, and sessions that survive a file."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
import torch

from dsnet_bluesky.features import CHANNELS, features_of
from dsnet_bluesky.library import examples
from dsnet_bluesky.library.examples import (
    Session,
    draw_instrument_of,
    load_session,
    measure,
    save_session,
    session,
)
from dsnet_bluesky.library.families import FAMILIES, make_shapes
from dsnet_bluesky.library.instruments import FINER, KINDS, draw_instrument
from dsnet_bluesky.library.lattices import make_structure_factors
from dsnet_bluesky.library.samples import Library

pytest.importorskip("sasmodels")

POINTS = (50, 70)


@pytest.fixture(scope="module")
def library() -> Library:
    cheap = [family for family in FAMILIES if family.name in ("sphere", "fuzzy_sphere", "dab")]
    return Library(
        [shape for family in cheap for shape in make_shapes(family, seed=1, count=2)], make_structure_factors("hardsphere", 1)[:3]
    )


@pytest.fixture(scope="module")
def measured(library):
    return measure(np.random.default_rng(0), draw_instrument_of([1, 2, 3], POINTS), library, 6)


@pytest.fixture(scope="module")
def made(measured) -> Session:
    return session(measured)


class TestMeasure:
    def test_shapes(self, measured):
        smearing = measured.instrument.smearing
        assert measured.I.shape == measured.Idev.shape == (6, smearing.q.size)
        assert measured.truth.shape == (6, smearing.q_calc.size)
        assert len(measured.families) == len(measured.levels) == 6
        assert (measured.truth > 0).all()
        assert (measured.Idev > 0).all()

    @pytest.mark.parametrize("kind", KINDS)
    def test_the_truth_is_what_was_measured(self, library, kind):
        """Smeared again on the fine grid it is the curve, but for noise of the level asked for."""
        instrument = draw_instrument(np.random.default_rng(1), kind, POINTS)
        found = measure(np.random.default_rng(2), instrument, library, 3, family="dab", level=1e-3, plain=True)
        fine = np.exp(np.array([np.interp(instrument.fine, instrument.smearing.q_calc, np.log(row)) for row in found.truth]))
        again = instrument.fine_smearing.apply(fine)
        assert np.median(np.abs(found.I / again - 1)) < 0.02
        assert found.families == ["dab"] * 3

    def test_levels_are_of_the_noise(self, library):
        instrument = draw_instrument(np.random.default_rng(1), "gaussian", POINTS)
        found = measure(np.random.default_rng(0), instrument, library, 5, level=0.05)
        np.testing.assert_allclose(found.levels, 0.05, rtol=0.05)

    def test_nodes_are_a_part_of_the_fine_grid(self, measured):
        """Truth is handed over at the nodes of the operator, without interpolation."""
        instrument = measured.instrument
        np.testing.assert_array_equal(instrument.fine[::FINER], instrument.smearing.q_calc)

    def test_seeds_reproduce(self, measured, library):
        again = measure(np.random.default_rng(0), draw_instrument_of([1, 2, 3], POINTS), library, 6)
        for name in ("I", "Idev", "truth"):
            np.testing.assert_array_equal(getattr(again, name), getattr(measured, name))
        assert draw_instrument_of([1, 2, 4], POINTS).smearing.digest != again.instrument.smearing.digest


class TestSession:
    def test_features_are_those_of_the_curves(self, measured, made):
        expected = features_of(made.operator, measured.I, measured.Idev)
        assert made.features.channels.shape == (6, CHANNELS, measured.instrument.smearing.q_calc.size)
        torch.testing.assert_close(made.features.channels.float(), expected.channels, rtol=1e-3, atol=1e-3)
        truth = np.exp(made.ln_truth.numpy()) * expected.scale.numpy()
        np.testing.assert_allclose(truth, measured.truth, rtol=1e-4)

    def test_batches(self, made):
        features, ln_truth = made.batch(torch.tensor([4, 1]), "cpu")
        assert features.channels.dtype == ln_truth.dtype == torch.float32
        torch.testing.assert_close(features.start, made.features.start[[4, 1]])
        torch.testing.assert_close(ln_truth, made.ln_truth[[4, 1]])

    def test_what_has_no_features_is_left_out(self, measured):
        broken = measured.I.copy()
        broken[2, 7] = np.nan
        rest = session(type(measured)(**{f.name: getattr(measured, f.name) for f in fields(measured)} | {"I": broken}))
        assert len(rest.ln_truth) == len(rest.features.channels) == len(rest.levels) == 5
        assert rest.families == measured.families[:2] + measured.families[3:]

    def test_it_survives_a_file(self, made, tmp_path):
        save_session(tmp_path / "00000.safetensors", made)
        back = load_session(tmp_path / "00000.safetensors")
        for one, other in zip(made.features, back.features, strict=True):
            assert torch.equal(one, other)
        assert torch.equal(made.ln_truth, back.ln_truth)
        assert (made.families, made.levels) == (back.families, back.levels)
        assert made.operator.smearing.digest == back.operator.smearing.digest
        assert made.operator.smearing.kind == back.operator.smearing.kind
        for name in ("matrix", "seen", "visible", "measured", "local", "unit", "place"):
            assert torch.equal(getattr(made.operator, name), getattr(back.operator, name))

    def test_a_crash_while_writing_leaves_no_session(self, made, tmp_path, monkeypatch):
        def crash(content, path, about):
            path.write_bytes(b"half a")
            raise OSError("disk full")

        monkeypatch.setattr(examples, "save_file", crash)
        with pytest.raises(OSError, match="disk full"):
            save_session(tmp_path / "00000.safetensors", made)
        assert not (tmp_path / "00000.safetensors").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_every_curve_becomes_an_example(library, kind):
    """Peaks, gratings and mixtures under every kind of instrument: nothing is lost to NaN."""
    made = kept = 0
    for seed in range(4):
        rng = np.random.default_rng([seed, 9])
        instrument = draw_instrument(rng, kind, POINTS)
        found = measure(rng, instrument, library, 10)
        made, kept = made + 10, kept + len(session(found).ln_truth)
    assert kept >= made - 1
