"""How a layer computes its product: the plain lines, and faster ones for what they know.

`PATHS` are asked in order; the first that supports a layer and an input computes it. Each agrees
with `PLAIN`, which serves everything. A quantized and a packed layer have the same slots and use
the same paths. On a CPU the compiled kernels compute float32 layers where they are built; torch
computes all others, a block of tokens at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kernels import cpu_library
from kernels.plain import is_plain
from robuq_bench.errors import ConfigError, UsageError
from robuq_bench.methods.activations._token_grid import GridQuantizer, token_grid
from robuq_bench.methods.branches.svd import LowRankBranch
from robuq_bench.methods.rotations._hadamard import HadamardRotation
from robuq_bench.methods.weights._codes import working
from robuq_bench.methods.weights._ternary import TernaryWeight, beside
from robuq_bench.quantization import cuda_path
from robuq_bench.quantization.cuda_path import product_dtype
from robuq_bench.quantization.fused import fused_linear
from robuq_bench.quantization.grids import grid_of, kernel_rotation

if TYPE_CHECKING:
    from kernels.hadamard_quantize.reference import Grid, Rotation
    from robuq_bench.quantization.linear import QuantizedLinear

__all__ = ["PATHS", "PLAIN", "Path", "path_for", "product_dtype", "quantized_weight"]


class Layer(Protocol):
    """What a path reads of a layer; None marks an empty slot."""

    bias: Any
    scaling: nn.Module | None
    rotation: nn.Module | None
    branch: nn.Module | None
    activation_quantizer: nn.Module | None

    @property
    def like(self) -> Tensor:
        """Any tensor of the dtype and on the device of the product."""

    def current_bits(self) -> int | Tensor | None: ...
    def rotate_input(self, x: Tensor) -> Tensor: ...
    def product_weight(self, dtype: torch.dtype | None) -> Tensor: ...


@dataclass(frozen=True)
class Path:
    """One way to compute a layer.

    Attributes:
        name: of the path.
        supports: (layer, x [..., in]) -> whether it serves them.
        weight: layer -> the weight that `product` takes.
        product: (layer, x, that weight) -> y [..., out].
    """

    name: str
    supports: Callable[[Layer, Tensor], bool]
    weight: Callable[[Layer], Tensor]
    product: Callable[[Layer, Tensor, Tensor], Tensor]


def path_for(layer: Layer, x: Tensor) -> Path:
    """The first path that serves the layer and the input."""
    return next((path for path in PATHS if path.supports(layer, x)), PLAIN)


def quantized_weight(
    master: Tensor,
    quantizer: nn.Module | None,
    dtype: torch.dtype | None = None,
    up: Tensor | None = None,
) -> Tensor:
    """Q_w(W) [out, in] in `dtype` (None: the master weight's), by a kernel where one serves it.

    `up` [out, r] stands to the right of it where it is given: [out, in + r].
    """
    dtype = dtype or master.dtype
    if quantizer is None:
        return beside(master.to(dtype), up)
    if not isinstance(quantizer, TernaryWeight):
        result: Tensor = quantizer(master)
        return beside(result.to(dtype), up)
    clamps_as_kernel = quantizer.clamps_in_backward or not quantizer.method.clamps
    if clamps_as_kernel and cuda_path.weight_reason(master, quantizer.rule) is None:
        return beside(cuda_path.ternary_weight(master, quantizer.rule, dtype), up)
    ternary: Tensor = quantizer(master, dtype, up)
    return ternary


# The plain lines.


def _plain_product(layer: Layer, x: Tensor, weight: Tensor) -> Tensor:
    tokens = layer.rotate_input(x if x.dtype == torch.float64 else x.float())
    quantizer, bits = layer.activation_quantizer, layer.current_bits()
    operand = tokens if quantizer is None or bits is None else quantizer(tokens, bits)
    y = F.linear(operand.to(weight.dtype), weight, layer.bias)
    return y if layer.branch is None else y + layer.branch(tokens.to(weight.dtype))


PLAIN = Path("plain", lambda *_: True, lambda layer: layer.product_weight(None), _plain_product)


# Paths for Hadamard rotations, low-rank branches and grids of one scale per token.


def _known(layer: Layer) -> bool:
    """Whether the slots hold what the fast paths know, by type and not by name."""
    return (
        layer.scaling is None
        and (layer.rotation is None or type(layer.rotation) is HadamardRotation)
        and (layer.branch is None or type(layer.branch) is LowRankBranch)
        and (
            layer.activation_quantizer is None or type(layer.activation_quantizer) is GridQuantizer
        )
    )


def _wide(layer: Layer, weight: Tensor) -> Tensor:
    """[weight | up], [out, in + r]: both products of a layer in one."""
    branch: Any = layer.branch
    return beside(weight, None if branch is None else branch.up)


def _parts(layer: Layer) -> tuple[Any, Any, bool, Any, Any]:
    """down, signs, rotated, grid and bits of a layer that `_known` accepts."""
    rotation: Any = layer.rotation
    branch: Any = layer.branch
    quantizer: Any = layer.activation_quantizer
    bits = layer.current_bits()
    return (
        None if branch is None else branch.down,
        None if rotation is None else rotation.signs,
        rotation is not None,
        None if bits is None else quantizer.grid,
        bits,
    )


def _on_kernels(layer: Layer, x: Tensor) -> bool:
    if not _known(layer):
        return False
    _, _, rotated, grid, bits = _parts(layer)
    return grid is not None and cuda_path.takes_tokens(x, layer.like, rotated, grid, bits)


def _kernel_product(layer: Layer, x: Tensor, weight: Tensor) -> Tensor:
    down, signs, rotated, grid, bits = _parts(layer)
    dtype = product_dtype(weight) or weight.dtype
    operand, tokens = cuda_path.fake_quantize(
        x, signs, rotated, grid, bits, dtype, want_rotated=down is not None
    )
    if down is not None:
        operand = torch.cat([operand, F.linear(tokens, down).to(dtype)], -1)
    return F.linear(operand, weight, layer.bias)


def _on_cpu(layer: Layer, x: Tensor) -> bool:
    """A GPU, half precision, compiling and tracing take another path.

    A trace would keep the blocks of the batch it was made with.
    """
    return (
        is_plain(x, layer.like)
        and x.dtype == layer.like.dtype
        and x.dtype in (torch.float32, torch.float64)
        and not torch.is_autocast_enabled("cpu")
        and _known(layer)
    )


def _on_compiled(layer: Layer, x: Tensor) -> bool:
    return (
        _on_cpu(layer, x)
        and x.dtype == torch.float32
        and cpu_library.is_usable()
        and _terms_of(layer, x) is not None
    )


def is_compiled(layer: QuantizedLinear) -> bool:
    """Whether compiled CPU kernels compute a layer's tokens or weight now, in training.

    They round otherwise than torch.
    """
    master, quantizer = layer.master_weight, layer.weight_quantizer
    return _on_compiled(layer, master[:0]) or (
        isinstance(quantizer, TernaryWeight) and quantizer.is_compiled(working(master))
    )


def _terms_of(layer: Layer, x: Tensor) -> tuple[Grid | None, Rotation | None] | None:
    _, _, rotated, grid, bits = _parts(layer)
    kind, name = (None, "") if grid is None else (type(grid), grid.name)
    try:
        if kind is not None and type(token_grid(name)) is not kind:
            return None  # one that took the name of another
        return _kernel_terms(x.shape[-1], rotated, name, bits)
    except (ConfigError, UsageError):
        return None


@functools.cache
def _kernel_terms(
    width: int, rotated: bool, name: str, bits: int
) -> tuple[Grid | None, Rotation | None]:
    """Grid (of no name: None) and rotation in the terms of the kernels."""
    rotation = kernel_rotation(width, torch.device("cpu")) if rotated else None
    return grid_of(name, bits) if name else None, rotation


def _compiled_weight(layer: Layer) -> Tensor:
    quantizer = getattr(layer, "weight_quantizer", None)  # a packed layer has none
    branch: Any = layer.branch
    if branch is not None and isinstance(quantizer, TernaryWeight):
        return quantized_weight(layer.like, quantizer, None, branch.up)
    return _wide(layer, layer.product_weight(None))


def _compiled_product(layer: Layer, x: Tensor, weight: Tensor) -> Tensor:
    from kernels.fake_quantize import cpu

    down, signs, *_ = _parts(layer)
    terms = _terms_of(layer, x)
    assert terms is not None
    operand = cpu.fake_quantize(x, terms[0], rotation=terms[1], signs=signs, down=down)
    return F.linear(operand, weight, layer.bias)


def _fused_product(layer: Layer, x: Tensor, weight: Tensor) -> Tensor:
    down, signs, rotated, grid, bits = _parts(layer)
    return fused_linear(x, weight, layer.bias, down, signs, rotated, grid, bits or 0)


PATHS = (
    Path(
        "kernels",
        _on_kernels,
        lambda layer: _wide(layer, layer.product_weight(product_dtype(layer.like))),
        _kernel_product,
    ),
    Path("compiled CPU", _on_compiled, _compiled_weight, _compiled_product),
    Path(
        "fused CPU",
        _on_cpu,
        lambda layer: _wide(layer, layer.product_weight(None)),
        _fused_product,
    ),
)
