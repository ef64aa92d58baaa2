"""The rotations whose effect on normality is compared, by name.

Every one is an orthogonal map of a token [n], fixed before any token is seen, but for the dual
rotation, which is fitted on calibration tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from robuq_bench import seeds
from robuq_bench.errors import UsageError, suggest
from robuq_bench.hadamard.goethals_seidel import GOETHALS_SEIDEL_ORDERS
from robuq_bench.hadamard.paley import paley_construction
from robuq_bench.hadamard.rotation import random_signs, rotate
from robuq_bench.hadamard.transform import hadamard_factors, hadamard_transform, is_supported
from robuq_bench.methods.rotations.dual_rotation import fit_dual_rotation
from robuq_bench.normality.names import TRANSFORMS
from robuq_bench.normality.statistics import MIN_N

_FULL_WIDTH = ("hadamard", "hadamard-without-dc", "randomized-hadamard")

Transform = Callable[[Tensor], Tensor]

DRAWN = ("hadamard", "randomized-hadamard")
"""Transforms that are a choice among many: `drawn_transforms` makes others of their kind."""


class NotApplicable(UsageError):  # noqa: N818 - the name says what happened
    """The transform is not defined at this width; the message says why."""


def make_transform(
    name: str, n: int, *, layer: str = "", seed: int = 0, calibration: Tensor | None = None
) -> Transform:
    """Return the map [T, n] -> [T, n] (float32 or float64) called `name`.

    - "identity": y = x.
    - "hadamard": y = x H / sqrt(n). The first column of H is constant where H is Sylvester's, so
      y_1 = sqrt(n) mean(x); of Paley's it has a few other signs (4 of 144), and y_1 most of that.
    - "hadamard-without-dc": the same without y_1, [T, n - 1].
    - "randomized-hadamard": y = x D H / sqrt(n), with the signs D that `quantize_` gives `layer`.
    - "random-orthogonal": Haar-distributed, one matrix per width and seed.
    - "block-hadamard-64", "-128": a Hadamard transform of every block of channels.
    - "dual-rotation": DuQuant's, as in LRQ-DiT; fitted on `calibration` [T, n].

    Raises:
        UsageError: unknown name.
        NotApplicable: the width is no multiple of the block, has no Hadamard matrix, or leaves
            too few coordinates for a test.
    """
    if name == "identity":
        return lambda x: x
    if name in _FULL_WIDTH and not is_supported(n):
        raise NotApplicable(f"{name}: no Hadamard matrix of order {n} is constructed here")
    if name == "hadamard":
        return hadamard_transform
    if name == "hadamard-without-dc":
        if n <= MIN_N:
            raise NotApplicable(f"{name} leaves {n - 1} inputs, too few for a test")
        return lambda x: hadamard_transform(x)[..., 1:]
    if name == "randomized-hadamard":
        signs = random_signs(n, layer, seed)
        return lambda x: rotate(x, signs.to(x.device, x.dtype))
    if name == "random-orthogonal":
        matrix = _haar_matrix(n, seed)
        return lambda x: x @ matrix.to(x.device, x.dtype)
    if name.startswith("block-hadamard-") and name in TRANSFORMS:
        block = int(name.rpartition("-")[2])
        if n % block:
            raise NotApplicable(f"{name} needs a width that is a multiple of {block}, not {n}")
        return lambda x: hadamard_transform(x.reshape(-1, n // block, block)).view(x.shape)
    if name == "dual-rotation":
        if calibration is None or not len(calibration):
            raise NotApplicable("dual-rotation needs calibration tokens of the layer")
        try:
            return fit_dual_rotation(calibration, seed=seed).apply
        except UsageError as error:
            raise NotApplicable(f"dual-rotation: {error}") from error
    raise UsageError(f"unknown transform {name!r}{suggest(name, TRANSFORMS)}")


def drawn_transforms(
    name: str, n: int, *, layer: str = "", seed: int = 0, draws: int = 1
) -> list[Transform]:
    """`draws` transforms of the kind `name`, one of `DRAWN`; the first is `make_transform`'s.

    Of the randomised one: other signs for the layer. Of the plain one: other Hadamard matrices
    with a constant column, the same for all layers of this width; see `equivalent_hadamard`.
    """
    own = make_transform(name, n, layer=layer, seed=seed)
    if name == "hadamard":
        return [own, *(equivalent_hadamard(n, seed, draw) for draw in range(1, draws))]
    others = [seeds.seeded("normality/sign draw", seed, draw) for draw in range(1, draws)]
    return [own, *(make_transform(name, n, layer=layer, seed=other) for other in others)]


def equivalent_hadamard(n: int, seed: int, draw: int) -> Transform:
    """The plain transform by another Hadamard matrix of order n, with a constant column too.

    Of the matrix H at hand the rows are permuted at random, and multiplied by the signs that make
    a random column constant. Order and signs of the other columns, which only reorder and flip the
    coordinates that a quantizer sees, stay.
    """
    generator = seeds.generator("normality/equivalent matrix", n, seed, draw)
    order = torch.randperm(n, generator=generator)
    unit = torch.zeros(1, n)
    unit[0, int(torch.randint(n, (), generator=generator))] = 1.0
    # A row of the transposed matrix is a column of H.
    signs = hadamard_transform(unit, inverse=True)[0].sign()
    return lambda x: rotate(x[..., order.to(x.device)], signs.to(x.device, x.dtype))


def matrix_name(transform: str, n: int) -> str:
    """The Hadamard matrix of a transform at width n by its constructions, "" for others.

    Its Kronecker factors in order, such as "Sylvester 4 x Paley II 36".
    """
    if transform.startswith("block-hadamard-"):
        n = int(transform.rpartition("-")[2])
    elif transform not in _FULL_WIDTH:
        return ""
    return " x ".join(f"{_construction(order)} {order}" for order in hadamard_factors(n))


def _construction(order: int) -> str:
    if order & (order - 1) == 0:
        return "Sylvester"
    if order in GOETHALS_SEIDEL_ORDERS:
        return "Goethals-Seidel"
    paley = paley_construction(order)
    assert paley is not None
    return "Paley II" if (paley == paley.T).all() else "Paley I"


@functools.lru_cache(maxsize=4)
def _haar_matrix(n: int, seed: int) -> Tensor:
    """Orthogonal [n, n] float32 from the uniform (Haar) distribution.

    QR of a Gaussian matrix with the signs of R's diagonal moved into Q (Mezzadri 2007).
    """
    generator = seeds.generator("normality/haar", n, seed)
    q, r = torch.linalg.qr(torch.randn(n, n, generator=generator))
    return q * torch.sign(torch.diagonal(r))
