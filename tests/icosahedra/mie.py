"""Mie scattering of a sphere, to compare with: C. F. Bohren and D. R. Huffman, Absorption and Scattering of Light by Small
Particles (1983), chapter 4. The recurrences are those of that chapter; nothing is taken from any program."""

import numpy as np


def amplitudes(size, index, cosine):
    """S1 and S2 of a sphere.

    Parameters
    ----------
    size
        Size parameter x = k R.
    index
        Refractive index m, Im(m) >= 0 for absorption.
    cosine
        Of the scattering angles, shape (n,).
    """
    count = int(size + 4 * size ** (1 / 3) + 10)
    a, b = coefficients(size, index, count)
    n = np.arange(1, count + 1)
    weight = (2 * n + 1) / (n * (n + 1))
    first, second = np.zeros(cosine.shape, complex), np.zeros(cosine.shape, complex)
    before, pi = np.zeros_like(cosine), np.ones_like(cosine)
    for order in range(1, count + 1):
        tau = order * cosine * pi - (order + 1) * before
        first += weight[order - 1] * (a[order - 1] * pi + b[order - 1] * tau)
        second += weight[order - 1] * (a[order - 1] * tau + b[order - 1] * pi)
        before, pi = pi, ((2 * order + 1) * cosine * pi - (order + 1) * before) / order
    return first, second


def coefficients(size, index, count):
    """a_n and b_n for n from 1 to count, with the logarithmic derivative by downward recurrence."""
    inner = index * size
    start = int(max(count, abs(inner))) + 30
    derivative = np.zeros(start + 1, complex)
    for n in range(start, 0, -1):
        derivative[n - 1] = n / inner - 1 / (derivative[n] + n / inner)
    psi, chi = [np.cos(size), np.sin(size)], [-np.sin(size), np.cos(size)]
    a, b = np.zeros(count, complex), np.zeros(count, complex)
    for n in range(1, count + 1):
        psi.append((2 * n - 1) / size * psi[-1] - psi[-2])
        chi.append((2 * n - 1) / size * chi[-1] - chi[-2])
        outgoing, before = psi[-1] - 1j * chi[-1], psi[-2] - 1j * chi[-2]
        for values, factor in ((a, derivative[n] / index + n / size), (b, index * derivative[n] + n / size)):
            values[n - 1] = (factor * psi[-1] - psi[-2]) / (factor * outgoing - before)
    return a, b
