"""`quantize_` over random module trees: a clear refusal, or the function of a float64 reference.

The reference never looks at a `QuantizedLinear`'s code: it takes the original weights, rotates them
by SciPy's or the constructed Hadamard matrix, decomposes with NumPy and quantizes by the formulas.
"""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from making import changed, of
from numpy.typing import NDArray
from torch import Tensor, nn

from robuq_bench.config import Plan, Rule, load_plan
from robuq_bench.errors import UsageError
from robuq_bench.hadamard.rotation import random_signs
from robuq_bench.hadamard.transform import hadamard_matrix
from robuq_bench.quantization.convert import quantize_, quantized_layers
from robuq_bench.quantization.gradient_clamp import defer_gradient_clamp

Matrix = NDArray[np.float64]
WIDTHS = (8, 12, 16)
CASES = 200
PLANS = ("a4", "a2-uniform", "a8", "baseline-a3", "bitnetv2-a4")
#: Δ_b of Max (1960) as the paper tabulates them.
STEPS = {2: 0.995687, 3: 0.586019, 4: 0.335201, 8: 0.030762}
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Residual(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.body(x)
        return result


class Twice(nn.Module):
    """One module under two names."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.first = body
        self.second = body

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.second(torch.tanh(self.first(x)))
        return result


class Wrapper(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.module(x)
        return result


class MyLinear(nn.Linear):
    """A subclass, which is left alone."""


def leaf(rng: Random, width: int) -> nn.Module:
    kinds = (nn.Linear, nn.Linear, nn.Linear, MyLinear, nn.GELU, nn.Tanh, nn.Identity)
    kind: Any = rng.choice(kinds)
    if not issubclass(kind, nn.Linear):
        return kind()
    return kind(width, width, bias=rng.random() < 0.5).requires_grad_(rng.random() < 0.5)


def tree(rng: Random, width: int, depth: int = 3) -> nn.Module:
    """A module that maps [..., width] to [..., width], of any shape that models come in."""
    if depth == 0 or rng.random() < 0.2:
        return leaf(rng, width)
    wrapper: Any = rng.choice((None, None, None, Residual, Twice, Wrapper))
    if wrapper is not None:
        return wrapper(tree(rng, width, depth - 1))
    return nn.Sequential(*(tree(rng, width, depth - 1) for _ in range(rng.randint(1, 3))))


@dataclass
class Case:
    model: nn.Module
    width: int
    plan: Plan
    dtype: torch.dtype
    tied: bool
    spoiled: bool
    seed: int


def case_of(seed: int) -> Case:
    rng = Random(seed)
    torch.manual_seed(seed)
    width = rng.choice(WIDTHS)
    model = tree(rng, width)
    linears = list(dict.fromkeys(m for m in model.modules() if isinstance(m, nn.Linear)))
    for position, linear in enumerate(linears):
        torch.nn.init.normal_(linear.weight, std=1 + position / 7)
        if linear.bias is not None:
            torch.nn.init.normal_(linear.bias)
    tied = len(linears) > 1 and rng.random() < 0.2
    if tied:
        linears[1].weight = linears[0].weight
    dtype = rng.choice(DTYPES)
    model = model.to(dtype)
    spoiled = bool(linears) and rng.random() < 0.1
    if spoiled:
        linears[-1].weight.data[0, 0] = rng.choice([float("nan"), float("inf")])
    if linears and rng.random() < 0.5:
        linears[0].register_forward_hook(lambda module, inputs, output: output * 2)
    plan = load_plan(rng.choice(PLANS))
    if rank_of(of(plan, "block")):
        plan = changed(plan, rank=2)
    return Case(model, width, plan, dtype, tied, spoiled, seed)


def rank_of(rule: Rule) -> int:
    branch: Any = rule.branch
    return 0 if branch is None else int(branch.rank)


def reference_weight(linear: nn.Linear, name: str, rule: Rule) -> tuple[Matrix, Matrix, Matrix]:
    """Rotation R [in, in], quantized weight and low-rank product, both [out, in] and rotated."""
    weight = linear.weight.detach().double().numpy()
    width = weight.shape[1]
    rotation = np.eye(width)
    if rule.rotation is not None:
        signs = np.ones(width)
        if rule.rotation.method == "randomized-hadamard":
            signs = random_signs(width, name, 0).double().numpy()
        rotation = np.diag(signs) @ hadamard_matrix(width).numpy() / np.sqrt(width)
    rotated = weight @ rotation
    branch = np.zeros_like(rotated)
    rank = rank_of(rule)
    if rank:
        u, s, vh = np.linalg.svd(rotated, full_matrices=False)
        branch = u[:, :rank] * s[:rank] @ vh[:rank]
    assert rule.weight is not None
    return rotation, ternary(rotated - branch, rule.weight.method), branch


def ternary(weight: Matrix, rule: str) -> Matrix:
    size = np.abs(weight)
    if rule == "ternary-absmean":
        scale = size.mean()
        return np.clip(np.round(weight / (scale + 1e-5)), -1, 1) * scale
    kept = size >= 0.5 * size.mean(1, keepdims=True)
    scale = (size * kept).sum(1, keepdims=True) / np.maximum(kept.sum(1, keepdims=True), 1)
    return np.sign(weight) * kept * scale


def tokens_quantized(x: Matrix, rule: str, bits: int) -> Matrix:
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    if rule == "robust-midtread":
        mean = x.mean(-1, keepdims=True)
        step = STEPS[bits] * np.sqrt(np.pi / 2) * np.abs(x - mean).mean(-1, keepdims=True)
        return mean + step * np.clip(np.round((x - mean) / step), low, high)
    if rule == "minmax":
        start = x.min(-1, keepdims=True)
        step = (x.max(-1, keepdims=True) - start) / (2**bits - 1)
        return start + step * np.round((x - start) / step)
    scale = np.abs(x).mean(-1, keepdims=True)
    return scale / np.sqrt(7) * np.clip(np.round(np.sqrt(7) * x / (scale + 1e-5)), low, high)


class ReferenceLinear(nn.Module):
    """What the layer should compute, in NumPy and float64."""

    def __init__(self, linear: nn.Linear, name: str, plan: Plan) -> None:
        super().__init__()
        # A lone linear is no BitNet v2 output layer by its name, so that plan rotates nothing here.
        rule = of(plan, "block")
        self.rotation, self.quantized, self.branch = reference_weight(linear, name, rule)
        self.activation = rule.activation
        self.offset = 0 if linear.bias is None else linear.bias.detach().double().numpy()

    def forward(self, x: Tensor) -> Tensor:
        rotated = x.double().numpy() @ self.rotation
        assert self.activation is not None
        codes = tokens_quantized(rotated, self.activation.method, self.activation.bits)
        y = codes @ self.quantized.T + rotated @ self.branch.T + self.offset
        return torch.from_numpy(y)


def reference(model: nn.Module, plan: Plan) -> nn.Module:
    """A float64 copy of the model whose plain linears are `ReferenceLinear`s under all names."""
    twin = copy.deepcopy(model).double()
    replaced: dict[nn.Module, nn.Module] = {}
    for name, module in twin.named_modules():
        if type(module) is nn.Linear:
            replaced[module] = ReferenceLinear(module, name, plan)
            replaced[module]._forward_hooks = module._forward_hooks
    for module in list(twin.modules()):
        for attribute, child in list(module.named_children()):
            if child in replaced:
                setattr(module, attribute, replaced[child])
    # `named_children` gives a child that is there twice only once.
    for module in twin.modules():
        if isinstance(module, Twice):
            module.second = module.first
    return replaced.get(twin, twin)


def is_refused(case: Case) -> bool:
    """Whether a plain layer is not finite, shares its weight with another module, or none is."""
    plain = [m for m in case.model.modules() if type(m) is nn.Linear]
    users = [m for m in case.model.modules() if isinstance(m, nn.Linear)]
    return not plain or any(
        not bool(layer.weight.isfinite().all())
        or any(other is not layer and other.weight is layer.weight for other in users)
        for layer in plain
    )


@pytest.mark.parametrize("seed", range(CASES))
def test_conversion_is_a_refusal_or_the_reference(seed: int) -> None:
    case = case_of(seed)
    plain = [m for m in case.model.modules() if type(m) is nn.Linear]
    before = {k: v.clone() for k, v in case.model.state_dict().items()}
    kinds = [type(m) for m in case.model.modules()]
    if is_refused(case):
        with pytest.raises(UsageError):
            quantize_(case.model, case.plan)
        # Nothing was changed.
        assert [type(m) for m in case.model.modules()] == kinds
        after = case.model.state_dict()
        assert all(_same(after[k], v) for k, v in before.items())
        return
    expected = reference(case.model, case.plan)
    model = quantize_(case.model, case.plan)
    assert len(quantized_layers(model)) == len(plain)
    assert not any(type(m) is nn.Linear for m in model.modules())
    x = torch.randn(4, case.width, generator=torch.Generator().manual_seed(case.seed))
    if case.dtype == torch.float64:
        with torch.no_grad():
            torch.testing.assert_close(
                model(x.double()), expected(x.double()), rtol=1e-6, atol=1e-8
            )
    else:
        check_layers(model, expected, case)
    defer_gradient_clamp(model)  # a float16 model is refused its backward pass otherwise
    model(x.to(case.dtype).requires_grad_()).float().square().mean().backward()


def _same(a: Tensor, b: Tensor) -> bool:
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


def check_layers(model: nn.Module, expected: nn.Module, case: Case) -> None:
    """Below float64 a flipped code is a step away: layer by layer, most outputs must agree."""
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 0.06, torch.float16: 0.01}[case.dtype]
    x = torch.randn(64, case.width, generator=torch.Generator().manual_seed(case.seed))
    references = dict(expected.named_modules())
    for name, layer in quantized_layers(model).items():
        assert {p.dtype for p in layer.parameters()} == {case.dtype}
        given = x.to(case.dtype)
        with torch.no_grad():
            found = layer.forward(given).double()
            wanted = references[name].forward(given.double())
        close = (found - wanted).abs() <= tolerance * (1 + wanted.abs())
        assert float(close.double().mean()) > 0.7


def test_the_cases_are_of_every_kind() -> None:
    """The fuzz above is worth nothing if it draws no linear layers, ties or shared modules."""
    seen: Counter[str] = Counter()
    for case in map(case_of, range(CASES)):
        modules = list(case.model.modules())
        seen["tied"] += case.tied
        seen["spoiled"] += case.spoiled
        seen["shared"] += any(isinstance(m, Twice) for m in modules)
        seen["root"] += type(case.model) is nn.Linear
        seen["several"] += sum(type(m) is nn.Linear for m in modules) > 1
        seen["converted"] += not is_refused(case)
    assert min(seen.values()) >= 5, seen
    assert seen["converted"] >= CASES / 3, seen
