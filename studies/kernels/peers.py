"""What `study kernels` times beside our kernels: libraries doing the same layer on the same data.

A peer takes the widths and rows of a case and nothing of its epilogue: the baselines are plain
products with bias, which is less work than ours does. A peer that is not installed, does not take
the shape, or computes something else yields a reason instead of a time.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robuq_bench.errors import MissingResourceError
from robuq_bench.hadamard.transform import hadamard_matrix
from robuq_bench.measuring.fp8 import ALIGNED, has_fp8
from robuq_bench.measuring.int8_peer import dynamic_int8
from studies.kernels.cases import ATTENTION, BF16, INT8, QUANTIZE, Case

BASELINE = "cuBLAS bf16"
FP8 = "torch._scaled_mm fp8"
SDPA = "F.scaled_dot_product_attention bf16"
MAX_RELATIVE_ERROR = 0.05  # of the root mean square; peers round tokens to 8 bits
INT_MM_LEAST_ROWS = 17

Work = list[Callable[[], object]]


class PeerUnavailableError(Exception):
    """This peer has no time for this case; the message says why."""


@dataclass(frozen=True)
class Layer:
    """One linear layer in every form that a peer may want, `copies` times.

    `x` bf16 [M, K], `codes` int8 [M, K], `weights` int8 ternary [copies][N, K] (N of all groups
    together), `scale` of all of them.
    """

    x: Tensor
    codes: Tensor
    weights: list[Tensor]
    bias: Tensor
    scale: float


def make_layer(case: Case, device: torch.device | str, copies: int, seed: int = 0) -> Layer:
    """Random tokens and `copies` random ternary weights of a product case."""
    generator = torch.Generator(device).manual_seed(seed)
    n, k = case.outputs * case.groups, case.width
    x = torch.randn(case.rows, k, generator=generator, device=device).bfloat16()
    codes = torch.randint(
        -128, 128, (case.rows, k), generator=generator, device=device, dtype=torch.int8
    )
    weights = [
        torch.randint(-1, 2, (n, k), generator=generator, device=device, dtype=torch.int8)
        for _ in range(copies)
    ]
    bias = torch.randn(n, generator=generator, device=device).bfloat16()
    return Layer(x, codes, weights, bias, 1 / math.sqrt(k))


def peers_of(case: Case) -> tuple[str, ...]:
    """Names of the peers of a case, the baseline of its verdict first."""
    if case.is_product:
        return (BASELINE, "torch._int_mm", FP8, "torchao int8", "gemlite A8W158")
    if case.kernel == ATTENTION:
        return (SDPA,)
    return ("fast-hadamard-transform",) if case.kernel == QUANTIZE and not case.prologue else ()


def make_peer(name: str, case: Case, layer: Layer | None, device: torch.device | str) -> Work:
    """One call per weight copy, checked against the layer's definition first.

    Raises:
        PeerUnavailableError: not installed, wrong result, or not this shape.
    """
    if name == "fast-hadamard-transform":
        return _dao(case, device)
    if name == SDPA:
        return sdpa(case, device)
    assert layer is not None
    if name == BASELINE:
        return _cublas(layer)
    if name == "torch._int_mm":
        return _int_mm(layer)
    if name == FP8:
        if not has_fp8(device):
            raise PeerUnavailableError("not supported: needs a GPU of compute capability 8.9")
        return fp8(layer)
    return _torchao(layer) if name == "torchao int8" else _gemlite(layer, device)


def make_cpu_peer(name: str, layer: Layer) -> Work:
    """One call per weight copy of a name in `CPU_PEERS`, checked as `make_peer` checks.

    Raises:
        PeerUnavailableError: wrong result, or torch has no such product for this CPU.
    """
    x, bias = layer.x.float(), layer.bias.float()
    if name == INT8:
        work = [_call(module, x) for module in _dynamic(layer)]
    elif name == BF16:
        weights = [weight.bfloat16() * layer.scale for weight in layer.weights]
        work = [_call(F.linear, layer.x, weight, layer.bias) for weight in weights]
    else:
        weights = [weight.float() * layer.scale for weight in layer.weights]
        work = [_call(F.linear, x, weight, bias) for weight in weights]
    found = work[0]()
    assert isinstance(found, Tensor)
    _check(found, _expected(layer, 0))
    return work


def _dynamic(layer: Layer) -> list[nn.Module]:
    linears = [nn.Sequential(_linear(layer, index).float()) for index in range(len(layer.weights))]
    try:
        return [dynamic_int8(linear) for linear in linears]
    except MissingResourceError as error:
        raise PeerUnavailableError(str(error)) from error


def _call(function: Callable[..., Any], *arguments: Any) -> Callable[[], object]:
    return lambda: function(*arguments)


def _expected(layer: Layer, index: int, rows: int = 64) -> Tensor:
    weight = layer.weights[index].float() * layer.scale
    return layer.x[:rows].float() @ weight.T + layer.bias.float()


def _check(found: Tensor, expected: Tensor) -> None:
    error = (found[: len(expected)].float() - expected).square().mean().sqrt()
    relative = float(error / expected.square().mean().sqrt())
    if not relative <= MAX_RELATIVE_ERROR:
        raise PeerUnavailableError(f"check failed: relative error {relative:.2g}")


def _need(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise PeerUnavailableError("not installed")


def _cublas(layer: Layer) -> Work:
    weights = [weight.bfloat16() * layer.scale for weight in layer.weights]
    _check(F.linear(layer.x, weights[0], layer.bias), _expected(layer, 0))
    return [_call(F.linear, layer.x, weight, layer.bias) for weight in weights]


def _int_mm(layer: Layer) -> Work:
    if len(layer.codes) < INT_MM_LEAST_ROWS:
        raise PeerUnavailableError(f"not supported: needs {INT_MM_LEAST_ROWS} rows")
    found = torch._int_mm(layer.codes, layer.weights[0].t())[:64].double()
    exact = layer.codes[:64].double() @ layer.weights[0].double().T
    if not torch.equal(found, exact):
        raise PeerUnavailableError("check failed: integer sums differ")
    return [_call(torch._int_mm, layer.codes, w.t()) for w in layer.weights]


def fp8(layer: Layer) -> Work:
    """Ternary weights and codes of 4 bits in e4m3, which holds both exactly, with their scales.

    Tensor cores add fp8 products in fewer bits than float32 has, so long sums need not be exact.
    """
    if any(size % ALIGNED for size in layer.weights[0].shape):
        raise PeerUnavailableError(f"not supported: needs multiples of {ALIGNED}")
    codes = layer.codes >> 4
    tokens = codes.to(torch.float8_e4m3fn)
    token_scale = torch.full((len(codes), 1), layer.scale, device=codes.device)
    channel_scale = torch.ones(1, len(layer.bias), device=codes.device)
    work = [
        _call(
            partial(torch._scaled_mm, bias=layer.bias, out_dtype=torch.bfloat16),
            tokens,
            weight.to(torch.float8_e4m3fn).t(),
            token_scale,
            channel_scale,
        )
        for weight in layer.weights
    ]
    found = work[0]()
    assert isinstance(found, Tensor)
    exact = codes[:64].float() @ layer.weights[0].float().T * layer.scale + layer.bias.float()
    _check(found, exact)
    return work


def sdpa(case: Case, device: torch.device | str) -> Work:
    """PyTorch's attention in bf16, on queries, keys and values that lie as the model's do."""
    shape = (case.images, case.tokens, 3, case.heads, case.width // case.heads)
    qkv = torch.randn(shape, device=device, dtype=torch.bfloat16)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    scores = q[0].float() @ k[0].float().mT / math.sqrt(q.shape[-1])
    _check(F.scaled_dot_product_attention(q, k, v)[0], scores.softmax(-1) @ v[0].float())
    return [_call(F.scaled_dot_product_attention, q, k, v)]


def _linear(layer: Layer, index: int) -> nn.Linear:
    weight = layer.weights[index]
    linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta", dtype=torch.bfloat16)
    linear.weight = nn.Parameter(weight.bfloat16() * layer.scale, requires_grad=False)
    linear.bias = nn.Parameter(layer.bias, requires_grad=False)
    return linear


def _torchao(layer: Layer) -> Work:
    _need("torchao")
    torchao = import_module("torchao.quantization")
    torch._dynamo.reset()
    work: Work = []
    for index in range(len(layer.weights)):
        linear = nn.Sequential(_linear(layer, index))
        torchao.quantize_(linear, torchao.Int8DynamicActivationInt8WeightConfig())
        work.append(_call(torch.compile(linear), layer.x))
    found = work[0]()
    assert isinstance(found, Tensor)
    _check(found, _expected(layer, 0))
    return work


def _gemlite(layer: Layer, device: torch.device | str) -> Work:
    _need("gemlite")
    helper = import_module("gemlite.helper")
    kind = getattr(helper, "A8W158", None) or getattr(helper, "A8W158_INT_dynamic", None)
    if kind is None:
        raise PeerUnavailableError("not supported: this gemlite has no A8W158")
    scale = torch.tensor(layer.scale)
    work = [
        _call(kind(device=str(device)).from_weights(w.bfloat16(), scale, layer.bias), layer.x)
        for w in layer.weights
    ]
    found = work[0]()
    assert isinstance(found, Tensor)
    _check(found, _expected(layer, 0))
    return work


def _dao(case: Case, device: torch.device | str) -> Work:
    _need("fast_hadamard_transform")
    fht = import_module("fast_hadamard_transform")
    k = case.width
    x = torch.randn(case.rows, k, device=device, dtype=torch.bfloat16)
    if k & (k - 1) == 0:
        transform = fht.hadamard_transform
        expected = x[:64].float() @ hadamard_matrix(k).float().to(device) / math.sqrt(k)
        _check(transform(x, 1 / math.sqrt(k)), expected)
    elif k % 12 == 0 and k // 12 & (k // 12 - 1) == 0:
        # Another matrix of that order: orthogonality is what can be asked of it.
        transform = fht.hadamard_transform_12N
        _check(transform(x, 1 / math.sqrt(k)).float().norm(dim=1), x.float().norm(dim=1))
    else:
        padded = 1 << (k - 1).bit_length()
        raise PeerUnavailableError(f"not comparable: pads {k} to {padded}")
    return [_call(transform, x, 1 / math.sqrt(k))]
