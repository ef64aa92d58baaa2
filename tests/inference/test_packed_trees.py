"""Random module trees, packed, exported and loaded: shared, tied, nested, hooked, in any dtype."""

from __future__ import annotations

import making
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from robuq_bench.config import load_plan
from robuq_bench.inference import PackedLinear, export_packed, load_packed, pack_
from robuq_bench.quantization.module_tree import exchange_layers, names_of

PLAN = load_plan("a4")

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def quantized(model: nn.Module) -> nn.Module:
    layers = names_of(model, nn.Linear).items()
    found = {layer: making.quantized(layer, names[0], rank=4) for layer, names in layers}
    return exchange_layers(model.eval(), found)


class Tree(nn.Module):
    """A random module tree of width 16: layers that are shared, tied, nested, hooked, frozen."""

    def __init__(self, choices: list[tuple[int, int, bool]], dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(len(choices))
        pool: list[nn.Module] = []
        for index, (kind, other, hooked) in enumerate(choices):
            module: nn.Module
            if kind == 1 and pool:
                module = pool[other % len(pool)]  # the same module once more
            elif kind == 2:
                module = nn.Sequential(nn.Linear(16, 16, bias=other > 2), nn.ReLU())
            elif kind == 3:
                module = nn.LayerNorm(16)
                norms = [m for m in pool if isinstance(m, nn.LayerNorm)]
                if norms:
                    module.weight = norms[0].weight
            elif kind == 4 and pool:
                module = nn.Sequential(pool[other % len(pool)], nn.Tanh())
            else:
                module = nn.Linear(16, 16)
            if hooked:
                module.register_forward_hook(lambda module, inputs, output: output + 1)
            pool.append(module.requires_grad_(other > 1))
            self.add_module(f"m{index}", module)
        self.last = nn.Linear(16, 16)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        for module in dict(self._modules).values():
            assert module is not None
            x = module(x)
        return x


@settings(max_examples=40)
@given(
    choices=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 5), st.booleans()), max_size=6),
    dtype=st.sampled_from(DTYPES),
    storage=st.sampled_from(["base3/fp32/fp32", "2bit/fp32/fp32"]),
)
@torch.no_grad()
def test_any_tree_of_modules_packs_and_loads_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory,
    choices: list[tuple[int, int, bool]],
    dtype: torch.dtype,
    storage: str,
) -> None:
    model = quantized(Tree(choices, dtype))
    x = torch.randn(2, 16, dtype=dtype)
    expected = model(x)
    pack_(model)
    assert torch.equal(model(x), expected)
    path = tmp_path_factory.getbasetemp() / "tree.safetensors"
    export_packed(model, path, plan=PLAN, storage=storage)
    into = Tree(choices, dtype)
    loaded, _ = load_packed(path, into=into)
    assert torch.equal(loaded(x), expected)
    for kind in (PackedLinear, nn.LayerNorm):
        found = list(names_of(loaded, kind).values())
        assert found == list(names_of(model, kind).values())
    weights = [{id(m.weight) for m in names_of(tree, nn.LayerNorm)} for tree in (loaded, model)]
    assert len(weights[0]) == len(weights[1])
