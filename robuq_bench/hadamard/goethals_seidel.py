"""Hadamard matrices of orders 156 and 172, which neither of Paley's families reaches.

Four circulant matrices A, B, C, D of odd order m with AA' + BB' + CC' + DD' = 4m I give one of
order 4m by the array of J. M. Goethals and J. J. Seidel, "A skew Hadamard matrix of order 36",
J. Austral. Math. Soc. 11 (1970). The first rows were found for this package by trying all rows that
stay the same when positions are multiplied by a fixed number mod m, so that the -1 fill whole
orbits; that leaves few enough candidates to match their autocorrelations in milliseconds.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["GOETHALS_SEIDEL_ORDERS", "goethals_seidel"]


class _Rows(NamedTuple):
    """First rows of A, B, C, D: -1 at r * multiplier^i mod m, i = 0, 1, ..., for each r listed."""

    multiplier: int
    minus: tuple[tuple[int, ...], ...]


_ROWS = {
    39: _Rows(29, ((1, 3, 6, 13, 21), (3, 4, 6, 7, 13), (2, 3, 4, 6, 21), (2, 3, 12, 13))),
    43: _Rows(4, ((1, 6, 7), (1, 3, 7), (3, 7, 9), (2, 3, 6, 7))),
}
GOETHALS_SEIDEL_ORDERS = tuple(4 * m for m in _ROWS)


def goethals_seidel(order: int) -> NDArray[np.int8] | None:
    """Hadamard matrix [order, order] of +-1, int8; None unless order is 156 or 172."""
    if order not in GOETHALS_SEIDEL_ORDERS:
        return None
    m = order // 4
    multiplier, minus = _ROWS[m]
    shift = (np.arange(m)[None, :] - np.arange(m)[:, None]) % m
    a, b, c, d = (_row(m, multiplier, representatives)[shift] for representatives in minus)
    # Right multiplication by the back-diagonal R reverses the columns.
    br, cr, dr = (x[:, ::-1] for x in (b, c, d))
    btr, ctr, dtr = (x.T[:, ::-1] for x in (b, c, d))
    return np.block(
        [[a, br, cr, dr], [-br, a, dtr, -ctr], [-cr, -dtr, a, btr], [-dr, ctr, -btr, a]]
    )


def _row(m: int, multiplier: int, representatives: tuple[int, ...]) -> NDArray[np.int8]:
    row = np.ones(m, dtype=np.int8)
    for representative in representatives:
        position = representative
        while row[position] == 1:
            row[position] = -1
            position = position * multiplier % m
    return row
