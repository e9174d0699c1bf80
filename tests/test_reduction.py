"""Reduction agrees with pyFAI, its variance is exact, and bad geometry is named."""

from pathlib import Path

import fabio.edfimage
import numpy as np
import pyFAI
import pytest

from dsnet_bluesky.data import BadInput
from dsnet_bluesky.reduction import Reduction, centred, integrator, invalid_pixels, load_mask, load_poni, psf, sum_frames
from dsnet_bluesky.reduction.geometry import beam_pixel, pixels_hit

PIXEL = 172e-6
CENTRE = (300.27, 240.61)
PONI = {
    "poni_version": 2.1,
    "dist": 1.0,
    "poni1": CENTRE[0] * PIXEL,
    "poni2": CENTRE[1] * PIXEL,
    "rot1": 0.0,
    "rot2": 0.0,
    "rot3": 0.0,
    "detector": "Pilatus300k",
    "detector_config": {"orientation": 3},
    "wavelength": 1.54e-10,
}
SHAPE = (619, 487)
MODULE_GAPS = pyFAI.detector_factory("Pilatus300k").mask.astype(bool)
Y = (np.arange(SHAPE[0]) + 0.5 - CENTRE[0]) * PIXEL
X = (np.arange(SHAPE[1]) + 0.5 - CENTRE[1]) * PIXEL
RADIUS = np.hypot(Y[:, None], X)


def pattern(rate: float, seed: int = 0) -> np.ndarray:
    frame = np.random.default_rng(seed).poisson(rate / (1 + (RADIUS / 5e-3) ** 2)).astype(np.int32)
    frame[MODULE_GAPS] = -1
    return frame


def beam(counts: float = 3e5, centre: tuple[float, float] = (0.0, 0.0), seed: int = 1) -> np.ndarray:
    inside = (abs(Y - centre[0])[:, None] < 2e-3) & (abs(X - centre[1]) < 1.25e-3)
    frame = np.random.default_rng(seed).poisson(counts * inside / inside.sum() + 1e-3).astype(np.int32)
    frame[MODULE_GAPS] = -1
    return frame


@pytest.fixture(scope="module")
def reduction() -> Reduction:
    return Reduction(PONI, bins=300)


def test_intensity_is_pyfai_s(reduction: Reduction):
    frame = pattern(20)
    result = pyFAI.load(PONI).integrate1d(
        frame, 300, unit="q_nm^-1", method=("no", "csr", "cython"), mask=MODULE_GAPS, correctSolidAngle=True
    )
    curve = reduction(frame)
    np.testing.assert_allclose(curve["q"], result.radial, rtol=1e-6)
    np.testing.assert_allclose(curve["I"][0], result.intensity, rtol=1e-5)


def test_variance_is_the_scatter_of_repeated_exposures(reduction: Reduction):
    """Also at half a count a pixel, where pyFAI's own Poisson model is 45 % off."""
    curve = reduction(np.stack([pattern(1.0, seed) for seed in range(60)]))
    ratio = curve["Idev"].mean("exposure") / curve["I"].std("exposure", ddof=1)
    assert float(np.median(ratio)) == pytest.approx(1, abs=0.03)


def test_neighbouring_bins_are_independent(reduction: Reduction):
    curve = reduction(np.stack([pattern(5.0, seed) for seed in range(60)]))
    deviation = ((curve["I"] - curve["I"].mean("exposure")) / curve["Idev"]).values
    assert abs(np.mean(deviation[:, 1:] * deviation[:, :-1])) < 0.02


def test_an_empty_frame_is_not_certain(reduction: Reduction):
    curve = reduction(np.where(MODULE_GAPS, -1, 0).astype(np.int32))
    assert (curve["Idev"] > 0).all()
    assert (curve["I"] == 0).all()


def test_time_monitor_and_transmission_divide(reduction: Reduction):
    frames = np.stack([pattern(20), pattern(20)])
    plain = reduction(frames)
    scaled = reduction(frames, time=[2.0, 4.0], monitor=3.0, transmission=0.5)
    np.testing.assert_allclose(scaled["I"] * np.array([[3.0], [6.0]]), plain["I"])
    np.testing.assert_allclose(scaled["Idev"] * np.array([[3.0], [6.0]]), plain["Idev"])
    with pytest.raises(BadInput, match="exposure time must be positive"):
        reduction(frames, time=0)


def test_dark_flat_and_polarisation_are_pyfai_s():
    rng = np.random.default_rng(4)
    flat, dark = rng.uniform(0.8, 1.2, SHAPE), rng.uniform(0, 2, SHAPE)
    frame = pattern(50).clip(0)
    ours = Reduction(PONI, bins=200, flat=flat, dark=dark, polarisation=0.9)(frame)
    theirs = pyFAI.load(PONI).integrate1d(
        frame,
        200,
        unit="q_nm^-1",
        method=("no", "csr", "cython"),
        mask=MODULE_GAPS,
        flat=flat,
        dark=dark,
        polarization_factor=0.9,
    )
    np.testing.assert_allclose(ours["I"][0], theirs.intensity, rtol=1e-4)


def test_gaps_hot_and_saturated_pixels_do_not_count(reduction: Reduction):
    clean = pattern(20)
    dirty = clean.copy()
    rows, columns = np.random.default_rng(0).integers(0, 480, (2, 40))
    dirty[rows, columns] = 2**20 - 1
    kept = Reduction(PONI, bins=300, mask=dirty == 2**20 - 1)(clean)
    np.testing.assert_allclose(reduction(dirty)["I"], kept["I"])


def test_frames_of_an_exposure_are_summed_without_a_ceiling():
    """A sum may exceed what one frame can hold; a pixel that saturates once does not count."""
    frames = np.full((4, 2, 2), 2**19, dtype=np.int32)
    frames[1, 0, 0] = 2**20 - 1
    frames[2, 0, 1] = -1
    total = sum_frames(frames, 2, "Pilatus 300k")
    np.testing.assert_array_equal(total, [[[-1, 2**20], [2**20, 2**20]], [[2**20, -1], [2**20, 2**20]]])
    np.testing.assert_array_equal(invalid_pixels(total, "Pilatus 300k"), total < 0)


def test_the_beam_is_found_measured_and_centred():
    direct = psf(beam(centre=(3 * PIXEL, -2 * PIXEL)), PONI)
    assert float(direct["beam"].sum()) == pytest.approx(1)
    assert float(direct["p"].sum()) == pytest.approx(1)
    assert float(direct["counts"]) == pytest.approx(3e5, rel=0.01)
    centre = centred(PONI, direct)
    # the beam covers whole pixels, so its centroid is a pixel's centre to within half a pixel
    assert centre["poni1"] / PIXEL == pytest.approx(CENTRE[0] + 3, abs=0.5)
    assert centre["poni2"] / PIXEL == pytest.approx(CENTRE[1] - 2, abs=0.5)
    expected = 2 * np.pi / 0.154 * np.sqrt((4e-3**2 + 2.5e-3**2) / 24)
    assert float(direct["sigma"]) == pytest.approx(expected, rel=0.02)


def test_hot_pixels_do_not_draw_the_centre():
    frame = beam()
    frame[[50, 400, 600], [30, 300, 450]] = 2**20 - 1
    np.testing.assert_allclose(psf(frame, PONI)["sigma"], psf(beam(), PONI)["sigma"], rtol=1e-6)


def test_a_hot_pixel_within_the_beam_is_no_hole():
    whole, hot = beam(), beam()
    hot[298, 244] = 2**20 - 1
    filled, reference = psf(hot, PONI), psf(whole, PONI)
    np.testing.assert_allclose(filled["counts"], reference["counts"], rtol=1e-3)
    np.testing.assert_allclose(filled["sigma"], reference["sigma"], rtol=1e-3)


@pytest.mark.parametrize("change", [{"rot1": 0.05}, {"rot2": -0.03, "rot3": 0.4}])
def test_a_tilted_detector_is_centred_on_the_beam(change: dict):
    poni = {**PONI, **change}
    ai = pyFAI.load(poni)
    fit = ai.getFit2D()
    ai.setFit2D(fit["directDist"], CENTRE[1], CENTRE[0], fit["tilt"], fit["tiltPlanRotation"])
    direct = psf(beam(), ai.get_config())
    moved = pyFAI.load(centred(ai.get_config(), direct)).getFit2D()
    assert moved["centerX"] == pytest.approx(direct.attrs["centre_x"], abs=1e-6)
    assert moved["centerY"] == pytest.approx(direct.attrs["centre_y"], abs=1e-6)


@pytest.mark.parametrize(
    ("frame", "poni", "message"),
    [
        (beam(counts=2000), PONI, "at least 10000 are needed"),
        (np.full(SHAPE, -1, np.int32), PONI, "no valid pixel"),
        (np.full(SHAPE, np.nan), PONI, "no valid pixel"),
        (np.zeros((100, 100)), PONI, "100 x 100 pixels"),
        (beam(), {**PONI, "detector": "Eiger4M"}, "Eiger"),
        (beam(), {**PONI, "wavelength": None}, "wavelength"),
        (beam(), {**PONI, "wavelength": 1.54}, "metres"),
        (beam(), {**PONI, "dist": -1.0}, "distance"),
        (beam(), {k: v for k, v in PONI.items() if k != "dist"}, "distance"),
        (beam(), {**PONI, "detector": "NoSuch"}, "not one that pyFAI understands"),
    ],
)
def test_bad_direct_beams_are_named(frame: np.ndarray, poni: dict, message: str):
    with pytest.raises(BadInput, match=message):
        psf(frame, poni)


def test_a_wrong_poni_is_noticed():
    wrong = {**PONI, "poni1": 0.01}
    with pytest.raises(BadInput, match="mm away"):
        centred(wrong, psf(beam(), wrong))


def test_a_detector_that_was_moved_keeps_its_own_centre():
    """The sample's frame is taken 17 pixels lower, to fill the gaps; only the recorded centre's error is corrected."""
    direct = psf(beam(centre=(1.4 * PIXEL, 0)), PONI)
    moved = centred({**PONI, "poni1": PONI["poni1"] + 17 * PIXEL}, direct)
    assert moved["poni1"] - centred(PONI, direct)["poni1"] == pytest.approx(17 * PIXEL)


@pytest.mark.parametrize("orientation", [1, 2, 3, 4])
def test_rays_through_pixels_hit_these_pixels(orientation: int):
    ai = integrator({**PONI, "rot1": 0.3, "rot2": -0.2, "rot3": 0.1, "detector_config": {"orientation": orientation}})
    rays = np.stack(ai.calc_pos_zyx(corners=False), axis=-1)
    expected = np.stack(np.indices(SHAPE), axis=-1) + 0.5
    np.testing.assert_allclose(pixels_hit(ai, 3.0 * rays), expected, atol=1e-4)  # pyFAI computes in single precision
    assert np.isnan(pixels_hit(ai, -rays[0, 0])).all()


@pytest.mark.parametrize("orientation", [1, 2, 3, 4])
def test_orientations_of_the_detector(orientation: int):
    poni = {**PONI, "detector_config": {"orientation": orientation}}
    ai = pyFAI.load(poni)
    row, column = np.unravel_index(np.argmin(ai.qArray(SHAPE)), SHAPE)
    frame = np.zeros(SHAPE, dtype=np.int32)
    frame[row - 5 : row + 6, column - 3 : column + 4] = 1000
    direct = psf(frame, poni)
    found = pyFAI.load(centred(poni, direct)).qArray(SHAPE)
    assert np.unravel_index(np.argmin(found), SHAPE) == (row, column)
    assert found[row, column] < 1e-3 * found[row, column + 1]


def lopsided(place: tuple[int, int]) -> np.ndarray:
    """A beam that no turn and no reflection leaves as it is."""
    y, x = np.indices(SHAPE) - np.array(place)[:, None, None]
    bar = np.exp(-(((y + x) / 9) ** 2) - ((y - x) / 3) ** 2)
    return np.round(1e4 * (bar + np.exp(-(((y - 6) / 2) ** 2) - ((x - 12) / 2) ** 2))).astype(np.int32)


@pytest.mark.parametrize(("orientation", "rot3"), [(1, 0.0), (2, 0.0), (4, 0.0), (3, np.pi / 2), (2, 0.7)])
def test_the_beam_lies_on_the_pixels_as_it_was_seen_however_the_detector_is_turned(orientation: int, rot3: float):
    """The same frames of the same detector, described in other axes: the same operator."""
    seen = np.ones(SHAPE, bool)
    seen[310:420, 250:] = False
    smearings = []
    for change in ({}, {"rot3": rot3, "detector_config": {"orientation": orientation}}):
        ai = integrator({**PONI, **change, "poni1": 0.0, "poni2": 0.0})
        first, second, _ = ai.detector.calc_cartesian_positions(np.array([0.5, 1.5]), np.array([0.5, 1.5]), center=False)
        row, column = beam_pixel(ai)
        ai.poni1, ai.poni2 = (CENTRE[0] - row) * float(np.diff(first)[0]), (CENTRE[1] - column) * float(np.diff(second)[0])
        direct = psf(lopsided((300, 240)), dict(ai.get_config()))
        reduction = Reduction(centred(dict(ai.get_config()), direct), mask=seen, bins=80)
        smearings.append(reduction.smearing(direct))
    np.testing.assert_allclose(smearings[1].q, smearings[0].q, rtol=1e-5)
    np.testing.assert_allclose(smearings[1].matrix, smearings[0].matrix, atol=2e-3)


def test_tilts_that_are_not_given_are_none():
    flat = {name: value for name, value in PONI.items() if not name.startswith("rot")}
    assert psf(beam(), flat).equals(psf(beam(), PONI))
    assert centred(flat, psf(beam(), flat)) == centred(PONI, psf(beam(), PONI))


@pytest.mark.parametrize(("counts", "background"), [(1e4, 0.03), (1e4, 0.1), (3e4, 0.1), (1e5, 0.5), (1e6, 2.0)])
def test_a_background_is_no_part_of_the_beam(counts: float, background: float):
    frame = beam(counts) + np.random.default_rng(7).poisson(background, SHAPE).astype(np.int32)
    frame[MODULE_GAPS] = -1
    direct = psf(frame, PONI, minimum_counts=5e3)
    assert float(direct["counts"]) == pytest.approx(counts, rel=0.05)
    assert float(direct["sigma"]) == pytest.approx(float(psf(beam(3e5), PONI)["sigma"]), rel=0.05)


def test_a_mask_that_hides_the_beam_is_named():
    with pytest.raises(BadInput, match="100% of the counts of the direct beam lie under its mask"):
        psf(beam(), PONI, mask=RADIUS < 5e-3)
    halo = np.random.default_rng(3).poisson(20 * np.exp(-RADIUS / 3e-3), SHAPE).astype(np.int32)
    with pytest.raises(BadInput, match="under its mask"):
        psf(np.where(MODULE_GAPS, -1, beam(1e7) + halo), PONI, mask=RADIUS < 2.5e-3)


def test_a_frame_without_a_spot_is_named():
    with pytest.raises(BadInput, match="not a spot"):
        psf(pattern(2000), PONI)
    with pytest.raises(BadInput, match="reaches its edge"):
        psf(beam(centre=(Y[2], 0.0)), PONI)


def test_a_beam_on_a_gap_is_refused():
    gap_row = np.flatnonzero(MODULE_GAPS[:, 240])[0]
    with pytest.raises(BadInput, match="gap"):
        psf(beam(centre=((gap_row - CENTRE[0]) * PIXEL, 0)), PONI)


def test_bad_frames_are_named(reduction: Reduction):
    nan = np.full(SHAPE, np.nan)
    with pytest.raises(BadInput, match="exposure 1 are NaN"):
        reduction(np.stack([pattern(5).astype(float), nan]))
    with pytest.raises(BadInput, match="100 x 100"):
        reduction(np.zeros((100, 100)))
    ring = np.where(RADIUS < 3e-3, -1, pattern(5))
    with pytest.raises(BadInput, match="into the mask"):
        reduction(ring)


@pytest.mark.parametrize(("peak", "halo"), [(2e6, 0.0), (3e6, 3e4), (2e7, 3e4)])
def test_a_beam_that_saturates_is_refused(peak: float, halo: float):
    """Its core would be missing in the operator; what is lost counts, not on how many pixels."""
    square = (RADIUS / PIXEL) ** 2
    rate = peak * np.exp(-square / 2 / 2.5**2) + halo * np.exp(-square / 2 / 12**2)
    frame = np.minimum(np.random.default_rng(4).poisson(rate), 2**20 - 1).astype(np.int32)
    frame[MODULE_GAPS] = -1
    with pytest.raises(BadInput, match=r"saturates \d+ pixels, which hold at least \d+% of it: attenuate"):
        psf(frame, PONI)
    assert psf(np.where(frame < 0, -1.0, rate), PONI)["counts"] == pytest.approx(rate.sum(), rel=0.02)


def test_masks_that_leave_nothing_or_do_not_fit():
    with pytest.raises(BadInput, match="leaves no pixel"):
        Reduction(PONI, mask=np.ones(SHAPE, dtype=bool))
    with pytest.raises(BadInput, match="give one that fits"):
        Reduction(PONI, mask=np.zeros((5, 5), dtype=bool))
    with pytest.raises(BadInput, match="widen the range"):
        Reduction(PONI, q_min=50, q_max=60)


def test_geometry_and_mask_files(tmp_path: Path):
    pyFAI.load(PONI).save(str(tmp_path / "geometry.poni"))
    assert load_poni(tmp_path / "geometry.poni")["dist"] == 1.0
    mask = np.zeros(SHAPE, dtype=np.int8)
    mask[:10] = 1
    fabio.edfimage.EdfImage(data=mask).write(str(tmp_path / "mask.edf"))
    np.save(tmp_path / "mask.npy", mask)
    for name in ("mask.edf", "mask.npy"):
        assert load_mask(tmp_path / name).sum() == 4870
    (tmp_path / "bad.poni").write_text("Distance: far\n")
    for call, name in ((load_poni, "bad.poni"), (load_poni, "none.poni"), (load_mask, "none.edf"), (load_mask, "bad.poni")):
        with pytest.raises(BadInput, match=name):
            call(tmp_path / name)


@pytest.mark.parametrize("bins", [50, 300])
def test_no_pixel_below_q_min_counts(bins: int):
    """The half-shadow of a beamstop lies there."""
    reduction = Reduction(PONI, bins=bins, q_min=0.3, q_max=2.0)
    q = pyFAI.load(PONI).qArray(SHAPE).ravel()
    assert q[reduction.bins >= 0].min() >= 0.3
    assert q[reduction.bins >= 0].max() <= 2.0
    np.testing.assert_allclose(abs(q - reduction.q[reduction.bins])[reduction.bins >= 0].max(), 0.85 / bins, rtol=0.02)


@pytest.mark.parametrize("sector", [(170, 190), (-190, -170), (90, 270), (350, 10), (-180, 180), (0, 360), (-20, 20)])
def test_a_sector_holds_its_pixels_also_across_180_degrees(sector: tuple[float, float]):
    """pyFAI's own ends there."""
    first, last = sector
    azimuth = np.degrees(pyFAI.load(PONI).chiArray(SHAPE))
    middle, half = (first + last) / 2 + 180 * (last < first), ((last - first) % 360 or 360) / 2
    inside = np.cos(np.radians(azimuth - middle)) >= np.cos(np.radians(half))
    used = Reduction(PONI, bins=100, sector=sector).bins.reshape(SHAPE) >= 0
    assert (used != inside & ~MODULE_GAPS).sum() <= 4  # on the very edge


def test_a_sector_sees_a_lying_beam_differently():
    """With a flat beam the resolution depends on the azimuth, and the operator knows it."""
    direct = psf(beam(), PONI)
    narrow, wide = (
        Reduction(centred(PONI, direct), bins=200, sector=sector, q_min=0.2, q_max=2.0).smearing(direct).widths.mean()
        for sector in ((-20, 20), (70, 110))
    )
    assert wide / narrow == pytest.approx(4.0 / 2.5, rel=0.1)
