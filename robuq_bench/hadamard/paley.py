"""Hadamard matrices of Paley's two families, built from finite-field arithmetic.

Source: R. E. A. C. Paley, "On orthogonal matrices", J. Math. Phys. 12 (1933).
"""

from __future__ import annotations

import functools
import itertools

import numpy as np
from numpy.typing import NDArray


def prime_power(q: int) -> tuple[int, int] | None:
    """Return `(p, k)` with q = p^k and p prime, or None if q is not a prime power."""
    if q < 2:
        return None
    p = next((d for d in range(2, int(q**0.5) + 1) if q % d == 0), q)
    k, rest = 0, q
    while rest % p == 0:
        rest //= p
        k += 1
    return (p, k) if rest == 1 else None


def _powers_of_x(p: int, k: int, polynomial: tuple[int, ...]) -> list[tuple[int, ...]] | None:
    """Powers 1, x, x^2, ... in GF(p)[x]/(x^k - polynomial), or None unless x generates them all."""
    one = (1,) + (0,) * (k - 1)
    powers, element = [one], one
    for _ in range(p**k - 1):
        carry = element[-1]
        shifted = (0, *element[:-1])
        element = tuple((s + carry * c) % p for s, c in zip(shifted, polynomial, strict=True))
        if element == one:
            break
        powers.append(element)
    return powers if len(powers) == p**k - 1 and element == one else None


@functools.cache
def quadratic_residue_matrix(q: int) -> NDArray[np.int8]:
    """Jacobsthal matrix Q[a, b] = chi(a - b) over GF(q), q an odd prime power; [q, q] int8.

    chi is the quadratic character: 0 at zero, +1 on squares, -1 elsewhere. With a primitive
    element x, chi(x^i) = (-1)^i, so no multiplication table is needed.
    """
    found = prime_power(q)
    if found is None or found[0] == 2:
        raise ValueError(f"{q} is not an odd prime power")
    p, k = found
    candidates = (_powers_of_x(p, k, c) for c in itertools.product(range(p), repeat=k))
    powers = next(found_powers for found_powers in candidates if found_powers is not None)
    place = p ** np.arange(k)
    character = np.zeros(q, dtype=np.int8)
    character[np.array(powers) @ place] = 1 - 2 * (np.arange(q - 1) % 2)
    digits = (np.arange(q)[:, None] // place) % p
    difference = (digits[:, None, :] - digits[None, :, :]) % p
    return character[difference @ place]


def paley_1(q: int) -> NDArray[np.int8]:
    """Skew-type Hadamard matrix of order q + 1 for a prime power q = 3 (mod 4); int8 +-1."""
    n = q + 1
    s = np.zeros((n, n), dtype=np.int8)
    s[0, 1:] = 1
    s[1:, 0] = -1
    s[1:, 1:] = quadratic_residue_matrix(q)
    return s + np.eye(n, dtype=np.int8)


def paley_2(q: int) -> NDArray[np.int8]:
    """Symmetric Hadamard matrix of order 2(q + 1) for a prime power q = 1 (mod 4); int8 +-1."""
    n = q + 1
    conference = np.ones((n, n), dtype=np.int8)
    conference[0, 0] = 0
    conference[1:, 1:] = quadratic_residue_matrix(q)
    off_diagonal = np.array([[1, 1], [1, -1]], dtype=np.int8)
    diagonal = np.array([[1, -1], [-1, -1]], dtype=np.int8)
    return np.kron(conference, off_diagonal) + np.kron(np.eye(n, dtype=np.int8), diagonal)


def paley_construction(order: int) -> NDArray[np.int8] | None:
    """Paley matrix of exactly this order, the symmetric family first; None if neither applies."""
    q = order // 2 - 1
    if order % 2 == 0 and q % 4 == 1 and prime_power(q) is not None:
        return paley_2(q)
    if (order - 1) % 4 == 3 and prime_power(order - 1) is not None:
        return paley_1(order - 1)
    return None
