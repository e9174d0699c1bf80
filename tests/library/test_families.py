"""Families of ideal curves: which set each belongs to, what they must not hold, and what their curves are."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsnet_bluesky.library.families import FAMILIES, MARGIN, Draw, Family, form_factor, make_shapes

pytest.importorskip("sasmodels")

BY_NAME = {family.name: family for family in FAMILIES}
CHEAP = ("sphere", "core_shell_sphere", "fuzzy_sphere", "dab", "poly_gauss_coil", "lamellar", "pearl_necklace")
MODELS = [pytest.param(family, id=family.name) for family in FAMILIES]


def draws(family: Family, count: int = 200) -> list[tuple[dict[str, float], float]]:
    draw = Draw(np.random.default_rng(0))
    return [family.draw(draw) for _ in range(count)]


def ball(x):
    """Amplitude squared of a sphere of diameter 1."""
    x = x / 2
    return (3 * (np.sin(x) - x * np.cos(x)) / x**3) ** 2


class TestSets:
    def test_each_family_is_in_one_set(self):
        assert len(BY_NAME) == len(FAMILIES)
        assert {family.split for family in FAMILIES} == {"training", "validation", "test"}

    def test_each_form_factor_is_in_one_set(self):
        """Two names for one model of sasmodels would let training see what tests are made of."""
        models = [family.model or family.name for family in FAMILIES]
        assert len(set(models)) == len(models)

    def test_paper_shapes_are_drawn_for_training(self):
        """The margins only mean something where the family is trained on."""
        assert BY_NAME["sphere"].split == BY_NAME["cylinder"].split == "training"


class TestParameters:
    @pytest.mark.parametrize("family", MODELS)
    def test_sasmodels_knows_them(self, family):
        """It ignores names that it does not know, without a word: a misspelt size would be the default's."""
        from sasmodels.core import load_model_info

        parameters = load_model_info(family.model or family.name).parameters.call_parameters
        for drawn, size in draws(family, 20):
            assert set(drawn) <= {parameter.name for parameter in parameters}
            assert np.isfinite(list(drawn.values())).all()
            assert size > 0

    @settings(max_examples=10, deadline=None)
    @given(seed=st.integers(0, 2**32 - 1))
    def test_cylinders_keep_away_from_those_of_the_paper(self, seed):
        """Radius 8.5 nm, length 40 nm; and SasView's default, radius 2 nm, length 40 nm. L / R decides at any size."""
        draw = Draw(np.random.default_rng(seed))
        for _ in range(200):
            parameters, _ = BY_NAME["cylinder"].draw(draw)
            ratio = parameters["length"] / parameters["radius"]
            assert 0.05 <= ratio <= 60
            assert abs(np.log(ratio / (400 / 85))) > MARGIN
            assert abs(np.log(ratio / 20)) > MARGIN

    @pytest.mark.parametrize("name", ["sphere", "vesicle", "cylinder", "ellipsoid", "parallelepiped", "core_shell_cylinder"])
    def test_size_is_the_largest_length(self, name):
        """x = q D is what curves are used by: D must be the diameter, the diagonal."""
        for p, size in draws(BY_NAME[name]):
            lengths = {
                "sphere": lambda p: 2 * p["radius"],
                "vesicle": lambda p: 2 * (p["radius"] + p["thickness"]),
                "cylinder": lambda p: np.hypot(2 * p["radius"], p["length"]),
                "ellipsoid": lambda p: 2 * max(p["radius_polar"], p["radius_equatorial"]),
                "parallelepiped": lambda p: np.sqrt(p["length_a"] ** 2 + p["length_b"] ** 2 + p["length_c"] ** 2),
                "core_shell_cylinder": lambda p: np.hypot(2 * (p["radius"] + p["thickness"]), p["length"] + 2 * p["thickness"]),
            }
            assert size == pytest.approx(lengths[name](p))


class TestShapes:
    @pytest.mark.parametrize("name", CHEAP)
    def test_curves(self, name):
        for shape in make_shapes(BY_NAME[name], seed=3, count=3):
            assert (shape.family, shape.split) == (name, BY_NAME[name].split)
            assert (shape.I >= 0).all()
            assert shape.I.max() == 1
            assert shape.x[-1] == pytest.approx(BY_NAME[name].reach)
            assert (np.diff(shape.x) > 0).all()
            assert np.isfinite(shape(np.geomspace(1e-6, 3 * shape.x[-1], 500))).all()

    def test_seeds_reproduce(self):
        one, again, other = ([s.I for s in make_shapes(BY_NAME["core_shell_sphere"], seed, 3)] for seed in (1, 1, 2))
        np.testing.assert_array_equal(one, again)
        assert not np.allclose(one, other)
        assert not np.allclose(one[0], one[1])

    def test_a_longer_series_begins_with_the_shorter(self):
        short, long = (list(make_shapes(BY_NAME["fuzzy_sphere"], 1, count)) for count in (1, 3))
        assert short[0].parameters == long[0].parameters

    def test_a_sphere_is_a_sphere(self):
        (shape,) = make_shapes(BY_NAME["sphere"], 1)
        x = np.random.default_rng(0).uniform(0.1, 250, 2000)
        np.testing.assert_allclose(shape(x), ball(x), atol=3e-4 * np.minimum(1, (x / 2) ** -4.0).max(), rtol=0.02)
        # Relative to the envelope of the minima, which is what a curve is judged by.
        envelope = 9 / (1 + (x / 2) ** 4)
        assert (np.abs(shape(x) - ball(x)) < 2e-3 * envelope).all()

    def test_below_the_grid_it_is_level_and_above_it_falls_as_it_did(self):
        (shape,) = make_shapes(BY_NAME["sphere"], 1)
        assert shape(np.array([0.0]))[0] == shape.I[0]
        beyond = shape(shape.x[-1] * np.array([1.0001, 2, 4]))
        np.testing.assert_allclose(np.diff(np.log(beyond)) / np.log(2), -4, atol=0.4)
        last = shape.I[shape.x > shape.x[-1] / 2].mean()
        assert 0.2 * last < beyond[0] < 5 * last

    def test_what_does_not_oscillate_is_interpolated_in_logarithms(self):
        (shape,) = make_shapes(BY_NAME["dab"], 1)
        x = np.geomspace(0.01, 900, 300)
        np.testing.assert_allclose(shape(x), (1 + x**2) ** -2.0 / (1 + shape.x[0] ** 2) ** -2.0, rtol=2e-3)

    def test_any_size_is_the_same_curve(self):
        """I(q; D) = I(q D): a curve computed once serves at every size."""
        family = BY_NAME["core_shell_sphere"]
        (shape,) = make_shapes(family, 4, 1)
        q = np.linspace(0.05, 3, 100)
        D = 7.0
        scale = 10 * D / (2 * (shape.parameters["radius"] + shape.parameters["thickness"]))
        sized = shape.parameters | {name: scale * shape.parameters[name] for name in ("radius", "thickness")}
        expected = form_factor("core_shell_sphere", q, background=0.0, **sized)
        ratio = shape(q * D) / expected
        np.testing.assert_allclose(ratio, np.median(ratio), rtol=0.02)
