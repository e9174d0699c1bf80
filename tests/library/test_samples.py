"""Ideal samples: positive curves that show something where the instrument looks, and never those of the paper."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsnet_bluesky.library import samples
from dsnet_bluesky.library.families import FAMILIES, MARGIN, Shape, make_shapes
from dsnet_bluesky.library.lattices import FLUIDS, LATTICES, make_structure_factors
from dsnet_bluesky.library.samples import (
    PAPER_STRENGTHS,
    Library,
    View,
    draw_sample,
    families_of,
    load_library,
    make_library,
    save_library,
)

pytest.importorskip("sasmodels")

TRAINING = ("sphere", "core_shell_sphere", "fuzzy_sphere", "dab", "poly_gauss_coil")
CHEAP = (*TRAINING, "pearl_necklace", "gel_fit", "multilayer_vesicle")
MILD = View(lowest=0.01, highest=5.0, width=0.04, step=0.01)
Q = np.linspace(0.01, 5.0, 400)


@pytest.fixture(scope="module")
def library() -> Library:
    """A few shapes of cheap families of all sets, and one fluid of each."""
    shapes = [shape for family in FAMILIES if family.name in CHEAP for shape in make_shapes(family, seed=1, count=2)]
    factors = [factor for name in ("hardsphere", "squarewell") for factor in make_structure_factors(name, seed=1)[:3]]
    return Library(shapes, factors)


class TestSets:
    def test_disjoint(self):
        training, validation, test = (set(families_of(split)) for split in ("training", "validation", "test"))
        assert not training & validation
        assert not training & test
        assert not validation & test
        assert training | validation | test == {family.name for family in FAMILIES} | set(LATTICES) | set(FLUIDS)
        assert min(len(training), len(validation), len(test)) >= 8

    def test_a_library_of_one_set_holds_nothing_else(self, library, tmp_path):
        save_library(tmp_path / "library.npz", library)
        for split in ("training", "validation", "test"):
            part = load_library(tmp_path / "library.npz", split)
            assert set(part.families) <= set(families_of(split))
            assert set(part.families) == set(library.families) & set(families_of(split))

    def test_a_crash_while_saving_leaves_what_was_there(self, library, tmp_path, monkeypatch):
        save_library(tmp_path / "library.npz", library)

        def crash(file, **arrays):
            file.write(b"half")
            raise KeyboardInterrupt

        monkeypatch.setattr(samples.np, "savez", crash)
        with pytest.raises(KeyboardInterrupt):
            save_library(tmp_path / "library.npz", library)
        assert load_library(tmp_path / "library.npz").families == library.families

    def test_make_library_takes_the_sets_it_is_asked_for(self, monkeypatch):
        few = [replace(family, count=1) for family in FAMILIES if family.name in CHEAP]
        monkeypatch.setattr(samples, "FAMILIES", few)
        monkeypatch.setattr(samples, "LATTICES", {})
        monkeypatch.setattr(samples, "FLUIDS", {"hardsphere": "training", "squarewell": "test"})
        assert set(make_library(1, ("training",)).families) == {"hardsphere", *TRAINING}
        both = make_library(1, ("validation", "test"))
        assert set(both.families) == {"squarewell", "pearl_necklace", "gel_fit", "multilayer_vesicle"}


def test_library_survives_a_file(library, tmp_path):
    save_library(tmp_path / "library.npz", library)
    back = load_library(tmp_path / "library.npz")
    assert back.families == library.families
    for family, shapes in library.shapes.items():
        for one, other in zip(shapes, back.shapes[family], strict=True):
            assert (one.family, one.split, one.parameters, one.oscillates) == (
                other.family, other.split, other.parameters, other.oscillates,
            )  # fmt: skip
            np.testing.assert_array_equal(one(Q * 9.0), other(Q * 9.0))
    for family, factors in library.structure_factors.items():
        for one, other in zip(factors, back.structure_factors[family], strict=True):
            np.testing.assert_array_equal(one(Q), other(Q))


def sizes_of(rng: np.random.Generator, shape: Shape, view: View) -> np.ndarray:
    """Sizes D at which a sample takes a shape, of one size or of a distribution."""
    asked = []

    def watch(x):
        asked.append(float(x[0]))
        return np.ones_like(x)

    watched = replace(shape)
    object.__setattr__(watched, "_spline", watch)
    samples._sized(rng, watched, view)(np.array([0.5]))
    return np.array(asked) / 0.5


class TestSpheresOfThePaper:
    """Tables are made with width times radius 0.12 and 0.24: at no size and under no width may training see them."""

    @settings(max_examples=25, deadline=None)
    @given(seed=st.integers(0, 2**32 - 1), width=st.floats(0.005, 0.4), lowest=st.floats(1e-3, 1.0))
    def test_stay_out(self, library, seed, width, lowest):
        rng = np.random.default_rng(seed)
        for _ in range(20):
            sizes = sizes_of(rng, library.shapes["sphere"][0], View(lowest, 5.0, width, step=0.02))
            strength = width * np.median(sizes) / 2  # of a distribution: the middle one
            assert all(abs(np.log(strength / paper)) > 0.99 * MARGIN for paper in PAPER_STRENGTHS)

    def test_what_is_as_good_as_a_sphere_stays_out_too(self, library):
        """A sphere with a fuzzy edge of a hundredth of its radius is the sphere of the tables by another name."""
        x = np.linspace(0.5, 30, 400)
        sphere = library.shapes["sphere"][0]
        (family,) = (family for family in FAMILIES if family.name == "fuzzy_sphere")
        near = [
            shape
            for shape in make_shapes(family, seed=2026, count=30)
            if np.mean((np.log(shape(x) + 3e-6) - np.log(sphere(x) + 3e-6)) ** 2) < 0.02
        ]
        assert near
        rng = np.random.default_rng(0)
        strengths = [0.04 * np.median(sizes_of(rng, shape, MILD)) / 2 for shape in near for _ in range(20)]
        assert min(abs(np.log(strength / paper)) for strength in strengths for paper in PAPER_STRENGTHS) > 0.99 * MARGIN


class TestSamples:
    @settings(max_examples=60, deadline=None)
    @given(
        seed=st.integers(0, 2**32 - 1),
        lowest=st.floats(1e-6, 1.0),
        width=st.floats(0.0, 0.5),
        step=st.floats(0.005, 0.1),
        plain=st.booleans(),
    )
    def test_curves_are_positive_and_finite(self, library, seed, lowest, width, step, plain):
        view = View(lowest, 5.0, max(width, 1e-9), step)
        sample = draw_sample(np.random.default_rng(seed), library, view, plain=plain)
        I = sample.I(np.append(0.0, np.geomspace(max(lowest, 1e-3), 6.0, 300)))
        assert np.isfinite(I).all()
        assert (I > 0).all()
        assert sample.family in [*library.families, "peaks", "grating"]

    @pytest.mark.parametrize("family", [*CHEAP, "hardsphere", "peaks", "grating"])
    def test_each_family_can_be_asked_for(self, library, family):
        rng = np.random.default_rng(2)
        for _ in range(5):
            sample = draw_sample(rng, library, MILD, family)
            assert sample.family == family
            assert (sample.I(Q) > 0).all()

    @pytest.mark.parametrize("family", ["sphere", "core_shell_sphere", "hardsphere"])
    def test_something_is_seen(self, library, family):
        """Not a flat line, and no Porod tail from end to end: most curves bend within the view."""
        rng = np.random.default_rng(3)
        spans = []
        for _ in range(40):
            I = draw_sample(rng, library, MILD, family, plain=True).I(Q)
            spans.append(np.log(I.max() / I.min()))
        assert np.median(spans) > 1

    def test_seeds_reproduce(self, library):
        one, again, other = (draw_sample(np.random.default_rng(seed), library, MILD).I(Q) for seed in (1, 1, 2))
        np.testing.assert_array_equal(one, again)
        assert not np.allclose(one, other)

    def test_all_families_come(self, library):
        rng = np.random.default_rng(0)
        drawn = {draw_sample(rng, library, MILD).family for _ in range(300)}
        assert drawn == {*library.families, "peaks", "grating"}

    def test_polydispersity_washes_minima_out(self, library):
        (sphere,) = library.shapes["sphere"][:1]
        q = np.linspace(1.0, 4.0, 2000)
        sharp, broad = (samples._distributed(sphere, 6.0, spread)(q) for spread in (1e-4, 0.2))
        np.testing.assert_allclose(sharp, sphere(q * 6.0), rtol=0.2, atol=1e-6)
        assert np.log(broad).min() > np.log(sharp).min() + 3

    def test_volume_squared_weighs_sizes(self, library):
        """Guinier: a distribution looks like a mean of R^8 over R^6, larger than its median."""
        (sphere,) = library.shapes["sphere"][:1]
        q = np.array([0.01, 0.1])
        I = samples._distributed(sphere, 6.0, 0.2)(q)
        size = np.sqrt(-np.log(I[1] / I[0]) / (q[1] ** 2 - q[0] ** 2) * 20)
        assert size == pytest.approx(6.0 * np.exp(7 * 0.2**2), rel=0.05)

    @pytest.mark.parametrize("share", [0.01, 1.0])
    def test_additions_are_of_the_size_asked_for(self, library, share):
        (sphere,) = library.shapes["sphere"][:1]
        (coil,) = library.shapes["poly_gauss_coil"][:1]
        added = samples._add(lambda q: sphere(q * 4.0), lambda q: coil(q * 2.0), MILD, share)
        more = added(Q) / sphere(Q * 4.0) - 1
        assert more.min() < share < more.max()

    def test_narrow_peaks_do_not_outgrow_everything(self):
        """At most q they are nothing: the size of an addition must not be taken from there."""
        first, q = np.ones_like, np.geomspace(0.01, 6.0, 2000)
        for place in (2.0, 5.9):  # within the view and beyond it
            added = samples._add(first, lambda q, p=place: np.exp(-0.5 * ((q - p) / 0.01) ** 2), MILD, 1.0)
            assert added(q).max() < 1e10
