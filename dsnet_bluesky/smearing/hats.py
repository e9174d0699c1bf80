"""Grids, and the integration of hat functions under kernels: what the constructors of `Smearing` are made of."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtr

from dsnet_bluesky.data import BadInput

Floats = NDArray[np.floating[Any]]

GAP = 2.5
"""A step is a gap where it is longer than this many of its neighbours."""


def extend(q: ArrayLike, below: float, above: float) -> Floats:
    """Extend a grid on both sides so that `q` stays part of it.

    The spacing goes on as it was at each end; far out (beyond 200 steps) it widens.
    Gaps within (a step of more than `GAP` times those about it) are filled at that spacing.
    The grid never goes below zero, and holds zero where it would.

    Parameters
    ----------
    q
        Ascending grid in 1/nm, shape (n,).
    below, above
        How far to go beyond the first and the last point, in 1/nm.

    Returns
    -------
    ndarray
        The extended and filled grid, which contains every point of `q`.
    """
    q = np.asarray(q, dtype=float)
    spacing = np.diff(q)
    step = float(np.median(spacing[:5]))
    low = q[0] - march(step, below)[::-1]
    if low.size and low[0] < 0.1 * step:
        low = np.append(0.0, low[low >= 0.1 * step])
    return np.concatenate([low[low < q[0]], filled(q), q[-1] + march(float(np.median(spacing[-5:])), above)])


def filled(q: Floats) -> Floats:
    """Fill the gaps of a grid (dead modules, points left out) at the spacing about them."""
    spacing = np.diff(q)
    usual = np.median(np.lib.stride_tricks.sliding_window_view(np.pad(spacing, 4, mode="edge"), 9), axis=1)
    # Beside the first or the last point a gap, repeated beyond the end, rules its own window.
    usual[0], usual[-1] = usual[:2].min(), usual[-2:].min()
    pieces = np.where(spacing > GAP * usual, np.ceil(spacing / usual), 1).astype(int).clip(max=200)
    if (pieces == 1).all():
        return q
    starts = np.repeat(q[:-1], pieces)
    place = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    return np.append(starts + place * np.repeat(spacing / pieces, pieces), q[-1])


def march(step: float, reach: float) -> Floats:
    """Distances step, 2 step ... that just pass `reach`; they widen after 200 steps."""
    if reach <= 1e-9 * step:
        return np.empty(0)
    uniform = step * np.arange(1, min(int(np.ceil(reach / step - 1e-9)), 200) + 1)
    if uniform[-1] >= reach * (1 - 1e-12):
        return uniform
    count = int(np.ceil(np.log(reach / uniform[-1]) / np.log(1.03)))
    return np.concatenate([uniform, uniform[-1] * 1.03 ** np.arange(1, count + 1)])


def grid(values: ArrayLike, name: str) -> Floats:
    """Return a read-only copy of an ascending grid, or say what is wrong with it."""
    grid = frozen(values)
    if grid.ndim != 1 or grid.size < 2:
        raise BadInput(f"{name} must be one-dimensional with at least two points; it has shape {grid.shape}.")
    if not np.isfinite(grid).all() or grid[0] < 0 or not (np.diff(grid) > 0).all():
        raise BadInput(f"{name} must be finite, not negative and strictly ascending; sort the points and merge repeated ones.")
    return grid


def frozen(values: ArrayLike) -> Floats:
    """Return a read-only copy."""
    array = np.array(values, dtype=float)
    array.setflags(write=False)
    return array


def positive(value: float, name: str) -> None:
    """Refuse a number that is not positive."""
    if not (np.isfinite(value) and value > 0):
        raise BadInput(f"{name} is {value}; it must be positive.")


def blocks(rows: int, columns: int, entries: int = 2_000_000) -> list[slice]:
    """Slices of rows that keep a (rows, columns) work array below `entries`."""
    size = max(1, entries // max(columns, 1))
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def locate(points: Floats, nodes: Floats) -> tuple[NDArray[np.intp], Floats]:
    """Index of the node to the left of each point and the fraction of the way to the next, clamped."""
    step = (nodes[-1] - nodes[0]) / (nodes.size - 1)
    if np.allclose(np.diff(nodes), step, rtol=1e-6, atol=0):
        position = np.clip((points - nodes[0]) / step, 0, nodes.size - 1)
        index = np.minimum(position.astype(np.intp), nodes.size - 2)
        return index, position - index
    inside = np.clip(points, nodes[0], nodes[-1])
    index = np.clip(np.searchsorted(nodes, inside, side="right") - 1, 0, nodes.size - 2)
    return index, (inside - nodes[index]) / (nodes[index + 1] - nodes[index])


def hats(points: Floats, weights: Floats, nodes: Floats) -> Floats:
    """Matrix of ``sum_k weights_ik hat_j(points_ik)``, shape (n, m)."""
    rows, size = points.shape[0], nodes.size
    index, fraction = locate(points, nodes)
    index = (index + size * np.arange(rows)[:, None]).ravel()
    right = (weights * fraction).ravel()
    left = weights.ravel() - right
    flat: Any = np.bincount(index, left, minlength=rows * size) + np.bincount(index + 1, right, minlength=rows * size)
    return flat.reshape(rows, size)


def from_moments(zeroth: Floats, first: Floats, nodes: Floats) -> Floats:
    """Hat weights from the moments of a kernel over each interval, shapes (n, m - 1)."""
    step = np.diff(nodes)
    matrix = np.zeros((zeroth.shape[0], nodes.size))
    matrix[:, :-1] += (nodes[1:] * zeroth - first) / step
    matrix[:, 1:] += (first - nodes[:-1] * zeroth) / step
    return matrix


def normal_hats(centre: Floats, sigma: Floats, nodes: Floats) -> Floats:
    """Integrate hats under normal densities over q' >= 0; rows with sigma = 0 mean nothing."""
    scale = np.where(sigma > 0, sigma, 1.0)[:, None]
    z = (nodes - centre[:, None]) / scale
    cumulative = ndtr(z)
    density = np.exp(-0.5 * z**2) / np.sqrt(2 * np.pi)
    zeroth = np.diff(cumulative, axis=1)
    first = centre[:, None] * zeroth - scale * np.diff(density, axis=1)
    matrix = from_moments(zeroth, first, nodes)
    matrix[:, 0] += cumulative[:, 0] - ndtr(-centre[:, None] / scale)[:, 0]
    matrix[:, -1] += 1 - cumulative[:, -1]
    return matrix


def quadrature(nodes: Floats, scale: float) -> tuple[Floats, Floats]:
    """Gauss-Legendre points and weights from 0 to the last node, fine against `scale`."""
    edges = np.unique(np.concatenate([[0.0], nodes]))
    pieces = np.maximum(np.ceil(np.diff(edges) / scale).astype(int), 1)
    fine = np.concatenate([np.linspace(a, b, n, endpoint=False) for a, b, n in zip(edges[:-1], edges[1:], pieces, strict=True)])
    fine = np.append(fine, edges[-1])
    x, w = np.polynomial.legendre.leggauss(8)
    half = np.diff(fine)[:, None] / 2
    return ((fine[:-1, None] + half) + half * x).ravel(), (half * w).ravel()


def close_rows(matrix: Floats) -> Floats:
    """Give what a kernel leaves beyond the last node to that node: rows then sum to one."""
    rest = 1 - matrix.sum(axis=1)
    assert rest.min() > -1e-6, "a kernel holds more than its whole weight"
    matrix[:, -1] += rest
    return matrix


def samples(span: float, spacing: Floats, least: int, most: int) -> int:
    """How many samples of a span lie no farther apart than the nodes (the median of their spacing), within bounds."""
    return int(np.clip(np.ceil(span / np.median(spacing)), least, most))


def midpoints(count: int) -> Floats:
    """Midpoints of `count` equal parts of [-1, 1]."""
    return (2 * np.arange(count) + 1) / count - 1


def length_profile(length: float, profile: tuple[ArrayLike, ArrayLike] | None) -> tuple[Floats, Floats]:
    """Edges of cells in |l|, shape (k + 1,), and the weight per length in each, shape (k,): 400 cells of a profile."""
    if profile is None:
        return np.array([0.0, length]), np.array([1.0 / length if length else np.inf])
    l, p = (np.asarray(v, dtype=float) for v in profile)
    if l.ndim != 1 or l.shape != p.shape or l.size < 2 or not (np.diff(l) > 0).all():
        raise BadInput("A slit-length profile needs two columns of one length: l ascending in 1/nm, and its weight.")
    edges = np.linspace(0, np.abs(l).max(), 401)
    centre = (edges[1:] + edges[:-1]) / 2
    density = np.interp(centre, l, p, left=0, right=0) + np.interp(-centre, l, p, left=0, right=0)
    total = float(density @ np.diff(edges))
    if not total > 0:
        raise BadInput("The slit-length profile has no weight.")
    return edges, density / total


def uniform_length(edges: Floats, density: Floats) -> float:
    """Half-length of the uniform slit whose <l^2> is that of cells of `length_profile`: it smears smooth curves alike."""
    return float(np.sqrt(density @ np.diff(edges**3)))


def slit_hats(q: Floats, edges: Floats, density: Floats, nodes: Floats) -> Floats:
    """Integrate hats along a slit: ``sum_k density_k int_{edges_k}^{edges_k+1} hat(sqrt(q^2 + l^2)) dl``."""
    if edges[-1] == 0:
        return hats(q[:, None], np.ones((q.size, 1)), nodes)
    if density.size == 1:
        return density[0] * slit_integral(q, float(edges[-1]), nodes)
    x, w = np.polynomial.legendre.leggauss(4)
    half = np.diff(edges)[:, None] / 2
    l, weight = (edges[:-1, None] + half + half * x).ravel(), (density[:, None] * half * w).ravel()
    points = np.hypot(q[:, None], l)
    return hats(points, np.broadcast_to(weight, points.shape), nodes)


def slit_integral(q: Floats, length: float, nodes: Floats) -> Floats:
    """``int_0^length hat_j(sqrt(q^2 + l^2)) dl``, shape (n, m), in closed form.

    With Q = sqrt(q^2 + l^2), dl = Q dQ / l; the moments over an interval of Q are
    differences of l and of (Q l + q^2 ln(Q + l)) / 2.
    """
    column = q[:, None]
    Q = np.clip(nodes, column, np.hypot(column, length))
    l = np.sqrt(np.maximum(Q**2 - column**2, 0))
    log = np.log(np.maximum(Q + l, np.finfo(float).tiny))
    zeroth = np.diff(l, axis=1)
    first = np.diff((Q * l + column**2 * log) / 2, axis=1)
    matrix = from_moments(zeroth, first, nodes)
    matrix[:, 0] += l[:, 0]
    matrix[:, -1] += length - l[:, -1]
    return matrix


def q_of(radius_squared: Any, distance: float, wavelength: float) -> Any:
    """``q = 4 pi / wavelength sin(theta / 2)`` from the squared radius on the detector, without trigonometry."""
    cosine = distance / np.sqrt(radius_squared + distance**2)
    return 4 * np.pi / wavelength * np.sqrt(np.maximum(0.5 * (1 - cosine), 0))


def bins_of(q: Floats, values: Floats) -> NDArray[np.intp]:
    """Index of the bin that each value lies in, -1 outside; edges half-way between the centres."""
    edges = np.concatenate([[1.5 * q[0] - 0.5 * q[1]], (q[1:] + q[:-1]) / 2, [1.5 * q[-1] - 0.5 * q[-2]]])
    index = np.searchsorted(edges, values, side="right") - 1
    return np.where(index < q.size, index, -1)


def sample_bins(q: Floats, y: NDArray, x: NDArray, bins: NDArray, per_bin: int) -> tuple[Floats, Floats, NDArray[np.intp]]:
    """Take up to `per_bin` pixels of each bin, evenly in azimuth: their y, x and bin."""
    keep = bins >= 0
    y, x, bins = np.asarray(y, dtype=float)[keep], np.asarray(x, dtype=float)[keep], bins[keep]
    order = np.lexsort((np.arctan2(y, x), bins))
    start = np.searchsorted(bins[order], np.arange(q.size + 1))
    count = np.diff(start)
    if (count == 0).any():
        empty = q[count == 0]
        raise BadInput(f"{empty.size} q bins hold no unmasked pixel (first at {empty[0]:.4g} 1/nm); leave them out of q.")
    picks = [s + (np.arange(min(n, per_bin)) + 0.5) * n / min(n, per_bin) for s, n in zip(start[:-1], count, strict=True)]
    chosen = order[np.concatenate(picks).astype(np.intp)]
    return y[chosen], x[chosen], bins[chosen]
