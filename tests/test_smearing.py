"""The identities that any smearing operator must satisfy, and independent checks of each constructor."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sasmodels.resolution import Pinhole1D, Slit1D
from scipy.signal import fftconvolve
from scipy.special import erf

from dsnet_bluesky.data import BadInput
from dsnet_bluesky.smearing import Smearing, extend

Q = np.linspace(0.01, 2.0, 200)
RHO = np.linspace(0, 0.12, 40)
RINGS = RHO * np.exp(-(RHO**2) / (2 * 0.03**2)) + 1e-9


def disc(radius_m: float = 1e-3, pixel: float = 172e-6) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    offsets = pixel * np.arange(-8, 9)
    return (np.hypot(offsets[:, None], offsets) < radius_m).astype(float), offsets, offsets


def detector(rows: int = 320, columns: int = 280, pixel: float = 172e-6) -> tuple[np.ndarray, np.ndarray]:
    y = pixel * (np.arange(rows) - 0.3 * rows + 0.5)
    x = pixel * (np.arange(columns) - 0.4 * columns + 0.5)
    return np.meshgrid(y, x, indexing="ij")  # type: ignore[return-value]


def coverage(per_bin: int = 128) -> Smearing:
    y, x = detector()
    q = np.linspace(0.05, 1.2, 120)
    return Smearing.pixel_coverage(q, y, x, *disc(), distance=1.0, wavelength=0.154, per_bin=per_bin)


OPERATORS = {
    "identity": lambda: Smearing.identity(Q),
    "gaussian": lambda: Smearing.gaussian(Q, 0.04),
    "pinhole": lambda: Smearing.pinhole(Q, 0.01 + 0.02 * Q),
    "pinhole, log grid": lambda: Smearing.pinhole(np.geomspace(1e-3, 3, 150), 0.05 * np.geomspace(1e-3, 3, 150)),
    "pinhole, sharp at zero": lambda: Smearing.pinhole(np.linspace(0, 1, 101), 0.1 * np.linspace(0, 1, 101)),
    "rice": lambda: Smearing.rice(Q, 0.04),
    "rings": lambda: Smearing.rings(Q, RHO, RINGS),
    "slit": lambda: Smearing.slit(Q, 0.7),
    "slit with width": lambda: Smearing.slit(Q, 0.7, 0.02),
    "slit, narrow": lambda: Smearing.slit(Q, 0.0, 0.02),
    "slit, log grid": lambda: Smearing.slit(np.geomspace(1e-3, 3, 150), 1.17),
    "slit profile": lambda: Smearing.slit(Q, 0, profile=(np.linspace(-1, 1, 41), 1 - np.linspace(-1, 1, 41) ** 2)),
    "wavelength": lambda: Smearing.wavelength(Q, 0.05),
    "pixel coverage": coverage,
    "product": lambda: (lambda beam: beam @ Smearing.wavelength(beam.q_calc, 0.02))(Smearing.rice(Q, 0.04)),
}


@pytest.fixture(params=OPERATORS, scope="module")
def operator(request: pytest.FixtureRequest) -> Smearing:
    return OPERATORS[request.param]()


def test_rows_sum_to_one_and_are_not_negative(operator: Smearing):
    np.testing.assert_allclose(operator.matrix.sum(axis=1), 1, atol=1e-12)
    assert operator.matrix.min() > -1e-9


def test_q_calc_contains_q_and_is_ascending(operator: Smearing):
    assert (np.diff(operator.q_calc) > 0).all()
    assert np.isin(operator.q, operator.q_calc).all()


def test_adjoint_numpy_and_torch(operator: Smearing):
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(3, operator.q_calc.size)), rng.normal(size=(3, operator.q.size))
    forward, backward = operator.apply(x), operator.adjoint(y)
    np.testing.assert_allclose((forward * y).sum(1), (x * backward).sum(1), rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(operator.apply(torch.tensor(x)).numpy(), forward, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(operator.adjoint(torch.tensor(y)).numpy(), backward, rtol=1e-12, atol=1e-14)
    assert operator.apply(torch.tensor(x, dtype=torch.float32)).dtype == torch.float32


def test_linear_curves_are_interpolated_exactly(operator: Smearing):
    np.testing.assert_allclose(operator.at_q(3 * operator.q_calc + 1), 3 * operator.q + 1, rtol=1e-12)


def test_the_matrix_cannot_be_changed(operator: Smearing):
    with pytest.raises(ValueError, match="read-only"):
        operator.matrix[0, 0] = 1


@settings(max_examples=6, deadline=None)
@given(sigma=st.floats(0.01, 0.08))
def test_parabola_gains_the_mean_square_radius(sigma: float):
    rice = Smearing.rice(Q, sigma, q_calc=np.linspace(0, 3.0, 3001))
    np.testing.assert_allclose(rice.apply(rice.q_calc**2), Q**2 + 2 * sigma**2, atol=3e-6)


@settings(max_examples=15, deadline=None)
@given(width=st.floats(0.01, 0.05), shape=st.floats(0.5, 4))
def test_parabola_through_rings(width: float, shape: float):
    rho = np.linspace(0, 0.2, 50)
    p = rho * np.exp(-((rho / width) ** shape)) + 1e-12
    rings = Smearing.rings(Q, rho, p, q_calc=np.linspace(0, 2.5, 2501))
    np.testing.assert_allclose(rings.apply(rings.q_calc**2), Q**2 + (p @ rho**2) / p.sum(), atol=3e-6)


@settings(max_examples=6, deadline=None)
@given(a=st.floats(0.5, 8), sigma=st.floats(0.02, 0.08))
def test_gaussian_curve_through_a_gaussian_beam(a: float, sigma: float):
    rice = Smearing.rice(Q, sigma, q_calc=np.linspace(0, 3, 3001))
    broad = 1 + (a * sigma) ** 2
    expected = np.exp(-((a * Q) ** 2) / (2 * broad)) / broad
    np.testing.assert_allclose(rice.apply(np.exp(-0.5 * (a * rice.q_calc) ** 2)), expected, atol=2e-5)


def test_detailed_balance():
    grid = np.linspace(0.005, 2.0, 400)
    for ring in (Smearing.rice(grid, 0.04, q_calc=grid), Smearing.rings(grid, RHO, RINGS, q_calc=grid, azimuths=512)):
        flow = grid[:, None] * ring.matrix
        inner = slice(60, -60)
        np.testing.assert_allclose(flow[inner, inner], flow.T[inner, inner], atol=0.02 * flow[inner, inner].max())


def test_rings_of_a_gaussian_are_rice():
    rho = np.linspace(0, 0.3, 400)
    p = rho * np.exp(-(rho**2) / (2 * 0.04**2))
    nodes = np.linspace(0, 2.6, 1301)
    curve = 1e-3 + np.exp(-5 * nodes) * (1 + np.cos(30 * nodes))
    np.testing.assert_allclose(
        Smearing.rings(Q, rho, p, q_calc=nodes).apply(curve), Smearing.rice(Q, 0.04, q_calc=nodes).apply(curve), rtol=2e-3
    )


def test_high_q_is_a_line_spread_with_a_shift():
    rings = Smearing.rings(Q, RHO, RINGS)
    mean_square = (RINGS @ RHO**2) / RINGS.sum()
    high = Q > 1
    np.testing.assert_allclose((rings.mean - Q)[high], mean_square / (4 * Q[high]), rtol=0.02)
    # hat functions of spacing h add up to h^2 / 6 to the variance
    np.testing.assert_allclose(rings.widths[high] ** 2, mean_square / 2 + (Q[1] - Q[0]) ** 2 / 6, rtol=0.02)


def test_pinhole_against_sasmodels():
    dq = 0.02 + 0.01 * Q
    ours = Smearing.pinhole(Q, dq, q_calc=np.linspace(5e-4, 2.6, 2600))
    theirs = Pinhole1D(Q / 10, dq / 10, q_calc=ours.q_calc / 10, nsigma=6)
    curve = sphere(ours.q_calc)
    inside = 5 * dq < Q  # below, sasmodels cuts the kernel at zero where ours folds it back
    np.testing.assert_allclose(ours.apply(curve)[inside], (curve @ theirs.weight_matrix)[inside], rtol=3e-3)


@pytest.mark.parametrize(("length", "width"), [(0.8, 0.0), (0.8, 0.02)])
def test_slit_against_sasmodels(length: float, width: float):
    nodes = np.linspace(5e-4, 2.6, 8000)
    ours = Smearing.slit(Q, length, width, q_calc=nodes)
    theirs = Slit1D(Q / 10, q_length=length / 10, q_width=width / 10, q_calc=nodes / 10)
    curve = sphere(nodes)
    inside = Q > 0.05
    np.testing.assert_allclose(ours.apply(curve)[inside], (curve @ theirs.weight_matrix)[inside], rtol=0.01)


@settings(max_examples=15, deadline=None)
@given(a=st.floats(0.5, 5), length=st.floats(0.05, 2))
def test_slit_in_closed_form(a: float, length: float):
    slit = Smearing.slit(Q, length, q_calc=np.linspace(0, 4, 4001))
    expected = np.exp(-0.5 * (a * Q) ** 2) * np.sqrt(np.pi / 2) / a * erf(a * length / np.sqrt(2)) / length
    np.testing.assert_allclose(slit.apply(np.exp(-0.5 * (a * slit.q_calc) ** 2)), expected, atol=1e-5)


def test_box_profile_is_the_plain_slit():
    box, plain = Smearing.slit(Q, 0, profile=(np.linspace(-0.7, 0.7, 9), np.ones(9))), Smearing.slit(Q, 0.7)
    np.testing.assert_allclose(box.matrix, plain.matrix, atol=1e-4)
    np.testing.assert_allclose(box.apply(sphere(box.q_calc)), plain.apply(sphere(plain.q_calc)), rtol=1e-4)


def test_wavelength_spread_of_a_parabola():
    spread = Smearing.wavelength(Q, 0.02, q_calc=np.linspace(0, 2.6, 2601))
    np.testing.assert_allclose(spread.apply(spread.q_calc**2)[20:], (Q**2 * (1 + 3 * 0.02**2))[20:], rtol=2e-4)


@pytest.mark.parametrize("kind", ["slit", "wavelength", "rings"])
def test_a_narrow_peak_through_a_kernel_of_many_steps_is_no_comb(kind: str):
    q = np.arange(0.002, 3, 0.002)
    peak = lambda q: np.exp(-((q - 2) ** 2) / (2 * 0.004**2))  # noqa: E731
    if kind == "slit":
        operator, offset = Smearing.slit(q, 0, 0.2), 0.2 * np.linspace(-1, 1, 8001)
        points, weight, near = lambda a: a + offset, np.ones(8001), np.abs(q - 2) < 0.19
    elif kind == "wavelength":
        operator, offset = Smearing.wavelength(q, 0.1), 0.1 * np.linspace(-5, 5, 20001)
        points, weight, near = lambda a: a / (1 + offset), np.exp(-0.5 * (offset / 0.1) ** 2), np.abs(q - 2) < 0.3
    else:
        operator, offset = Smearing.rings(q, [0.3], [1.0]), np.cos((np.arange(20000) + 0.5) * np.pi / 20000)
        points, weight, near = lambda a: np.sqrt(a**2 + 0.09 - 0.6 * a * offset), np.ones(20000), np.abs(q - 2) < 0.25
    truth = np.array([np.average(peak(points(a)), weights=weight) for a in q[near]])
    np.testing.assert_allclose(operator.apply(peak(operator.q_calc))[near], truth, rtol=0.05)


def test_composition_is_one_after_the_other():
    beam = Smearing.rice(Q, 0.03)
    spread = Smearing.wavelength(beam.q_calc, 0.05)
    curve = np.exp(-spread.q_calc)
    np.testing.assert_allclose((beam @ spread).apply(curve), beam.apply(spread.apply(curve)), rtol=1e-12)
    with pytest.raises(BadInput, match="q_calc"):
        beam @ Smearing.wavelength(Q, 0.05)


def sphere(q: np.ndarray, radius: float = 8.0, background: float = 1e-3) -> np.ndarray:
    x = np.maximum(q * radius, 1e-3)
    return (3 * (np.sin(x) - x * np.cos(x)) / x**3) ** 2 + background


@pytest.mark.parametrize("shape", ["disc", "slit", "slit in a sector", "slit behind a mask"])
def test_pixel_coverage_against_brute_force_in_two_dimensions(shape: str):
    """A pattern convolved in the detector plane and averaged over bins is R times the curve."""
    pixel, distance, wavelength, fine = 172e-6, 1.0, 0.154, 3
    y, x = detector()
    half_y, half_x = (1e-3, 1e-3) if shape == "disc" else (2e-3, 0.25e-3)
    offsets = pixel * np.arange(-14, 15)
    inside = (
        np.hypot(offsets[:, None], offsets) < half_y
        if shape == "disc"
        else (abs(offsets)[:, None] < half_y) & (abs(offsets) < half_x)
    )
    beam = inside.astype(float)
    mask = np.zeros(y.shape, dtype=bool)
    if shape == "slit in a sector":
        mask |= abs(np.arctan2(y, x)) > 0.4
    if shape == "slit behind a mask":
        mask[100:120] = mask[:, 60:80] = True
    # brute force on a finer plane that reaches beyond the detector by the beam
    margin = 15
    index_y = (np.arange(-margin * fine, (y.shape[0] + margin) * fine) + 0.5) / fine
    index_x = (np.arange(-margin * fine, (y.shape[1] + margin) * fine) + 0.5) / fine
    py, px = y[0, 0] + (index_y - 0.5) * pixel, x[0, 0] + (index_x - 0.5) * pixel
    radius = np.hypot(py[:, None], px)
    ideal = sphere(4 * np.pi / wavelength * np.sin(0.5 * np.arctan(radius / distance)))
    spread = np.zeros((29 * fine, 29 * fine))
    spread[1::fine, 1::fine] = beam / beam.sum()
    spread = spread[: 28 * fine + 3, : 28 * fine + 3]
    blurred = fftconvolve(ideal, spread, mode="same")[1::fine, 1::fine][margin:-margin, margin:-margin]
    q = np.linspace(0.08, 1.2, 120)
    smearing = Smearing.pixel_coverage(
        q,
        y,
        x,
        beam,
        offsets,
        offsets,
        distance=distance,
        wavelength=wavelength,
        mask=mask,
        per_bin=1000,
        q_calc=np.linspace(0, 1.4, 600),
    )
    q_pixel = 4 * np.pi / wavelength * np.sin(0.5 * np.arctan(np.hypot(y, x) / distance))
    edges = np.append(q - (q[1] - q[0]) / 2, q[-1] + (q[1] - q[0]) / 2)
    count, _ = np.histogram(q_pixel[~mask], edges)
    total, _ = np.histogram(q_pixel[~mask], edges, weights=blurred[~mask])
    np.testing.assert_allclose(smearing.apply(sphere(smearing.q_calc)), total / count, rtol=0.006)


def test_full_azimuth_pixel_coverage_agrees_with_rings():
    y, x = detector(400, 400)
    y, x = y - y[200, 200], x - x[200, 200]
    beam, by, bx = disc()
    q = np.linspace(0.1, 0.9, 80)
    scale = 2 * np.pi / 0.154
    rings = Smearing.rings(q, (scale * np.hypot(by[:, None], bx)).ravel(), beam.ravel())
    pixels = Smearing.pixel_coverage(q, y, x, beam, by, bx, distance=1.0, wavelength=0.154, per_bin=1000, q_calc=rings.q_calc)
    curve = sphere(rings.q_calc, 6.0)
    np.testing.assert_allclose(pixels.apply(curve), rings.apply(curve), rtol=0.03)


@settings(max_examples=30, deadline=None)
@given(below=st.floats(0, 0.5), above=st.floats(0, 5), n=st.integers(5, 300), log=st.booleans())
def test_extend_reaches_and_keeps_q(below: float, above: float, n: int, log: bool):
    q = np.geomspace(0.01, 2, n) if log else np.linspace(0.01, 2, n)
    grid = extend(q, below, above)
    assert (np.diff(grid) > 0).all()
    assert np.isin(q, grid).all()
    assert grid[0] <= max(q[0] - below, 0) + 1e-9
    assert grid[-1] >= (q[-1] + above) * (1 - 1e-9)
    assert grid[0] >= 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Smearing.gaussian(Q[::-1], 0.1), "ascending"),
        (lambda: Smearing.gaussian(Q, 0), "positive"),
        (lambda: Smearing.gaussian(Q, np.nan), "positive"),
        (lambda: Smearing.pinhole(Q, Q[:5]), "agree"),
        (lambda: Smearing.pinhole(Q, -0.1 * Q), "not negative"),
        (lambda: Smearing.slit(Q, 0), "does not smear"),
        (lambda: Smearing.slit(Q, 0, profile=([1, 0], [1, 1])), "ascending"),
        (lambda: Smearing.slit(Q, 0, profile=([0, 1], [0, 0])), "no weight"),
        (lambda: Smearing.rings(Q, [0, 1], [0, 0]), "positive"),
        (lambda: Smearing.slit(Q, np.nan), "does not smear"),
        (lambda: Smearing.wavelength(Q, 1.5), "not small"),
        (lambda: Smearing.wavelength(Q, 0.2), "not small"),
        (lambda: Smearing(Q, Q, np.eye(3)), "shape"),
        (lambda: Smearing(Q, Q, np.full((200, 200), np.nan)), "NaN"),
    ],
)
def test_bad_input_is_named(make, message: str):
    with pytest.raises(BadInput, match=message):
        make()


def test_pixel_coverage_names_empty_bins_and_empty_beams():
    y, x = detector()
    beam, by, bx = disc()
    with pytest.raises(BadInput, match="no unmasked pixel"):
        Smearing.pixel_coverage(np.linspace(0.05, 9, 50), y, x, beam, by, bx, distance=1.0, wavelength=0.154)
    with pytest.raises(BadInput, match="no intensity"):
        Smearing.pixel_coverage(Q, y, x, 0 * beam, by, bx, distance=1.0, wavelength=0.154)


def test_digest_names_the_operator():
    assert Smearing.gaussian(Q, 0.04).digest == Smearing.gaussian(Q, 0.04).digest
    assert Smearing.gaussian(Q, 0.04).digest != Smearing.gaussian(Q, 0.0401).digest


class TestGaps:
    """Between two modules of a detector the ideal curve goes on, though nothing was measured there."""

    FINE = np.linspace(0, 2.6, 5201)

    @settings(max_examples=30, deadline=None)
    @given(start=st.integers(5, 150), length=st.integers(3, 40), log=st.booleans())
    def test_are_filled_at_the_spacing_about_them(self, start: int, length: int, log: bool):
        whole = np.geomspace(0.05, 2, 200) if log else Q
        q = np.delete(whole, slice(start, start + length))
        grid = extend(q, 0.0, 0.0)
        assert np.isin(q, grid).all()
        assert (np.diff(grid) > 0).all()
        inside = grid[(grid >= whole[start - 1]) & (grid <= whole[start + length])]
        usual = [whole[start - 1] - whole[start - 2], whole[start + length + 1] - whole[start + length]]
        assert np.diff(inside).max() < 1.6 * max(usual)
        assert np.diff(inside).min() > 0.4 * min(usual)

    @pytest.mark.parametrize("whole", [Q, np.geomspace(0.05, 2, 200)], ids=["linear", "logarithmic"])
    @pytest.mark.parametrize("last", [False, True])
    @pytest.mark.parametrize("length", [3, 12, 40])
    def test_beside_the_first_and_the_last_point_are_filled(self, whole, last, length):
        q = np.delete(whole, slice(-1 - length, -1) if last else slice(1, 1 + length))
        grid = extend(q, 0.0, 0.0)
        assert np.isin(q, grid).all()
        low, high = (q[-2], q[-1]) if last else (q[0], q[1])
        usual = q[-2] - q[-3] if last else q[2] - q[1]
        inside = np.diff(grid[(grid >= low) & (grid <= high)])
        assert 0.6 * usual < inside.min() <= inside.max() < 1.1 * usual

    @pytest.mark.parametrize(
        "q",
        [
            Q,
            np.geomspace(1e-3, 3, 60),
            np.geomspace(1e-3, 3, 20),
            np.concatenate([np.linspace(0.01, 0.1, 50), np.linspace(0.13, 2, 60)]),  # a scan that changes its step
            Q + 0.002 * np.sin(100 * Q),
        ],
    )
    def test_a_grid_without_gaps_stays_as_it_is(self, q: np.ndarray):
        np.testing.assert_array_equal(extend(q, 0.0, 0.0), q)

    def test_a_minimum_within_a_gap_is_smeared_right(self):
        """Without nodes in the gap the curve was taken as straight across it."""
        curve = sphere(self.FINE, 6.0)
        minimum = Q[np.argmin(sphere(Q, 6.0) * (Q < 1) + (Q >= 1))]
        q = Q[np.abs(Q - minimum) > 0.08]
        truth = Smearing.gaussian(q, 0.03, q_calc=self.FINE).apply(curve)
        filled = Smearing.gaussian(q, 0.03)
        bridged = Smearing.gaussian(q, 0.03, q_calc=np.setdiff1d(filled.q_calc, Q[np.abs(Q - minimum) <= 0.0801]))
        near = np.abs(q - minimum) < 0.12
        error, before = (
            np.abs(operator.apply(sphere(np.maximum(operator.q_calc, 1e-6), 6.0)) / truth - 1)[near].max()
            for operator in (filled, bridged)
        )
        assert error < 0.03
        assert error < before / 5


def test_operators_go_to_other_processes_unchanged():
    smearing = Smearing.pinhole(np.linspace(0.1, 1, 20), 0.03)
    again = pickle.loads(pickle.dumps(smearing))
    assert again.digest == smearing.digest
    assert (again.kind, dict(again.parameters)) == (smearing.kind, dict(smearing.parameters))
    np.testing.assert_array_equal(again.resolution, 0.03)
    with pytest.raises(ValueError, match="read-only"):
        again.matrix[0, 0] = 1


def test_a_resolution_is_that_of_the_instrument_and_not_of_the_grid():
    dq = 0.02 * Q
    beam = Smearing.pinhole(Q, dq)
    np.testing.assert_array_equal(beam.resolution, dq)
    # A product does not hold what its factors were built from.
    product = Smearing.gaussian(Q, 0.03) @ Smearing.gaussian(Smearing.gaussian(Q, 0.03).q_calc, 0.04)
    np.testing.assert_allclose(product.resolution[30:], np.hypot(0.05, (Q[1] - Q[0]) / np.sqrt(6)), rtol=1e-3)
    assert not Smearing.identity(Q).resolution.any()
