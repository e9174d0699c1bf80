"""Curves are built and refused with reasons."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsnet_bluesky.data import (
    BadInput,
    check_curve,
    check_intensities,
    concat_exposures,
    curve,
    estimate_idev,
    exposures_of,
    failed_exposure,
)

Q = np.linspace(0.01, 5.01, 501)
I = np.exp(-Q) + 1e-3


def test_a_curve_carries_units_and_meaning():
    one = curve(Q, I, 0.01 * I, Qdev=0.02, sample="AgBh")
    assert one["I"].dims == ("q",)
    assert one["q"].attrs["units"] == "1/nm"
    assert one["I"].attrs["uncertainties"] == "Idev"
    assert one["I"].attrs["long_name"] == "intensity"
    assert one["Qdev"].shape == (501,)
    assert one.attrs["sample"] == "AgBh"


def test_several_exposures():
    many = curve(Q, np.stack([I, 2 * I]), np.stack([I, I]))
    assert many["I"].dims == ("exposure", "q")
    assert exposures_of(many) is many
    assert exposures_of(curve(Q, I, I)).sizes["exposure"] == 1


@pytest.mark.parametrize(
    ("q", "intensity", "idev", "message"),
    [
        (Q[::-1], I, I, "not ascending"),
        (np.r_[Q[:5], Q[4], Q[6:]], I, I, r"q\[4\]"),
        (Q, np.where(Q > 3, np.nan, I), I, "not finite at .* 3.0"),
        (Q, I, np.where(Q > 3, np.inf, I), "Idev is not finite"),
        (Q, I, 0 * I, "must be positive"),
        (Q, I[:5], None, "must agree"),
        (Q, I, I[:5], "must agree"),
        (Q[:4], I[:4], None, "at least 5"),
        (Q - 1, I, I, "not negative"),
        (Q, np.ones((2, 2, 501)), None, "3 dimensions"),
        (Q, np.ones((0, 501)), None, "no exposure"),
        (Q, np.ones((0, 501)), np.ones((0, 501)), "no exposure"),
    ],
)
def test_bad_curves_are_named(q, intensity, idev, message):
    with pytest.raises(BadInput, match=message):
        curve(q, intensity, idev)


def test_a_dataset_that_is_no_curve():
    with pytest.raises(BadInput, match="lacks Idev"):
        check_curve(curve(Q, I, I).drop_vars("Idev"))


@settings(max_examples=20, deadline=None)
@given(noise=st.floats(0.003, 0.2), scale=st.floats(1e-6, 1e6), seed=st.integers(0, 100))
def test_noise_is_estimated_from_the_scatter(noise: float, scale: float, seed: int):
    rng = np.random.default_rng(seed)
    values = scale * I * (1 + noise * rng.normal(size=I.size))
    assert np.median(estimate_idev(values) / (scale * noise * I)) == pytest.approx(1, abs=0.2)


def test_estimated_noise_is_marked_and_never_zero():
    assert curve(Q, np.ones(501)).attrs["Idev_estimated"] == 1
    assert (estimate_idev(np.zeros(501)) > 0).all()


@pytest.mark.parametrize("nothing", [slice(8), slice(40), slice(400, None)], ids=["stop", "wide stop", "tail"])
def test_zero_intensities_get_no_exploding_weight(nothing):
    values = I * (1 + 0.01 * np.random.default_rng(0).normal(size=I.size))
    values[nothing] = 0
    sigma = estimate_idev([values, 0 * values, 1e-9 * values])
    usual = np.median(sigma[0][values != 0])
    assert (sigma[0][nothing] >= 0.099 * usual).all()
    assert (sigma[1] == 1).all()
    np.testing.assert_allclose(sigma[2], 1e-9 * sigma[0])
    np.testing.assert_allclose(estimate_idev(values), sigma[0])


@pytest.mark.parametrize(("name", "value"), [("I", np.nan), ("Idev", np.inf), ("Idev", 0.0)])
def test_one_bad_exposure_does_not_spoil_a_batch(name, value):
    arrays = {"I": np.tile(I, (3, 1)), "Idev": np.tile(I, (3, 1))}
    arrays[name][1, 7] = value
    batch = curve(Q, arrays["I"], arrays["Idev"])
    with pytest.raises(BadInput, match=f"{name} (is not finite at 1 points|must be positive)"):
        check_intensities(batch)
    with pytest.raises(BadInput, match=name):
        check_curve(batch.isel(exposure=[1]))


def test_a_bad_exposure_without_errors_does_not_spoil_a_batch():
    values = np.tile(I, (3, 1))
    values[1] = np.nan
    np.testing.assert_array_equal(curve(Q, values)["Idev"][0], curve(Q, I)["Idev"])


def test_failed_exposures_join_the_others():
    good = exposures_of(curve(Q, I, I)).assign(
        chi2=("exposure", [1.0]), flags=("exposure", [3]), answer=("exposure", ["network"]), status=("exposure", ["ok"])
    )
    joined = concat_exposures([failed_exposure(good), good, failed_exposure(good.isel(exposure=0))])
    assert joined.sizes == {"exposure": 3, "q": 501}
    assert list(joined["status"].values) == ["failed", "ok", "failed"]
    assert list(joined["answer"].values) == ["", "network", ""]
    assert np.isnan(joined["I"].values).all(axis=1).tolist() == [True, False, True]
    assert np.isnan(joined["chi2"].values).tolist() == [True, False, True]
    assert {name: v.dtype for name, v in joined.variables.items()} == {name: v.dtype for name, v in good.variables.items()} | {
        "status": np.dtype("<U6")
    }
    assert joined["I"].attrs == good["I"].attrs


def test_masked_points_are_no_points():
    q = np.linspace(0.1, 1, 20)
    hot = np.ma.masked_greater(np.where(np.arange(20) == 7, 1e6, 1.0), 1e5)
    with pytest.raises(BadInput, match="I is not finite at 1 points"):
        curve(q, hot, np.ones(20))
    with pytest.raises(BadInput, match="q must be finite"):
        curve(np.ma.masked_less(q, 0.2), np.ones(20), np.ones(20))


def test_a_curve_of_another_program_is_in_1_nm_and_its_errors_are_of_its_shape():
    made = curve(np.linspace(0.1, 1, 20), np.ones((3, 20)), np.ones((3, 20)))
    assert check_curve(made.assign_coords(q=made["q"].assign_attrs(units="nm^-1"))).sizes["exposure"] == 3
    with pytest.raises(BadInput, match="q is in '1/angstrom'; convert it to 1/nm"):
        check_curve(made.assign_coords(q=made["q"].assign_attrs(units="1/angstrom")))
    with pytest.raises(BadInput, match=r"give both \(q,\), or both \(exposure, q\)"):
        check_curve(made.assign(Idev=made["Idev"].isel(exposure=0, drop=True)))
    with pytest.raises(BadInput, match=r"give both \(q,\), or both \(exposure, q\)"):
        check_curve(made.expand_dims(frame=2))
