"""Structure factors of paracrystals and fluids."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsnet_bluesky.library import lattices
from dsnet_bluesky.library.families import FAMILIES, MARGIN, Draw
from dsnet_bluesky.library.lattices import FLUIDS, LATTICES, PAPER_DISORDER, StructureFactor, make_structure_factors

pytest.importorskip("sasmodels")

QUICK = [name for name in FLUIDS if name != "two_yukawa"]  # which takes seconds


def test_each_is_in_one_set_and_no_family():
    names = [*LATTICES, *FLUIDS]
    assert len(set(names)) == len(names)
    assert not set(names) & {family.name for family in FAMILIES}
    assert set(LATTICES.values()) | set(FLUIDS.values()) == {"training", "validation", "test"}


@pytest.mark.parametrize("name", FLUIDS)
def test_interactions_are_parameters_of_sasmodels(name):
    from sasmodels.core import load_model_info

    known = {parameter.name for parameter in load_model_info(name).parameters.call_parameters}
    assert set(lattices._interaction(name, Draw(np.random.default_rng(0)))) <= known


@pytest.fixture(scope="module", params=QUICK)
def fluid(request) -> list[StructureFactor]:
    return make_structure_factors(request.param, seed=5)


def test_fluids(fluid):
    for factor in fluid:
        assert factor.split == FLUIDS[factor.family]
        assert (factor.S > 0).all()
        assert factor(np.array([factor.x[-1]]))[0] == pytest.approx(1, abs=0.1)
        assert np.isfinite(factor(np.geomspace(1e-4, 1e4, 50))).all()


def test_seeds_reproduce(fluid):
    again = make_structure_factors(fluid[0].family, seed=5)
    np.testing.assert_array_equal([factor.S for factor in fluid], [factor.S for factor in again])
    other = make_structure_factors(fluid[0].family, seed=6)
    assert not np.allclose(fluid[0].S, other[0].S)


def test_hard_spheres_repel():
    """Percus-Yevick in the limit of long waves: S(0) = (1 - phi)^4 / (1 + 2 phi)^2, below 1; and a peak at contact."""
    for factor in make_structure_factors("hardsphere", seed=1)[:10]:
        assert factor.S[0] < 0.8
        assert 5 < factor.x[factor.S.argmax()] < 9


def test_one_far_above_the_range():
    factor = StructureFactor("hardsphere", "training", np.array([1.0, 2.0]), np.array([0.5, 1.0]))
    np.testing.assert_array_equal(factor(np.array([0.0, 1.5, 1e3])), [0.5, 0.75, 1.0])


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_the_cubic_lattice_of_the_paper_stays_out(seed):
    """SasView's default simple cubic paracrystal, d_factor 0.06, is a test case; disorder decides at any size."""
    asked = []

    def evaluate(q, parameters):
        asked.append(parameters["d_factor"])
        return np.ones_like(q)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lattices, "kernel", lambda name: evaluate)
        made = lattices._lattice("sc_paracrystal", Draw(np.random.default_rng(seed)))
    assert len(asked) == len(made) == lattices.LATTICE_SHAPES
    assert min(abs(np.log(disorder / PAPER_DISORDER)) for disorder in asked) > MARGIN


def test_a_paracrystal_has_its_peaks_in_their_places(monkeypatch):
    """Simple cubic: orders at q d = 2 pi sqrt(h^2 + k^2 + l^2), the first of them strong, and 1 far out."""
    monkeypatch.setattr(lattices, "LATTICE_SHAPES", 1)
    monkeypatch.setattr(lattices, "REACH", 31.0)
    monkeypatch.setattr(Draw, "aside", lambda self, low, high, *avoided: low)  # the least disorder
    evaluated = lattices.kernel("sc_paracrystal")
    fewer = lambda name: lambda q, parameters: np.interp(q, q[::4], evaluated(q[::4], parameters))  # noqa: E731
    monkeypatch.setattr(lattices, "kernel", fewer)
    (factor,) = make_structure_factors("sc_paracrystal", seed=0)
    assert factor.split == "training"
    assert factor.x[factor.S.argmax()] == pytest.approx(2 * np.pi, rel=0.03)
    assert factor.S.max() > 2
    assert factor(np.array([60.0]))[0] == pytest.approx(1, abs=0.2)
