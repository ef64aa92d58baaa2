"""What the tests of the compiled CPU kernels share: forced instruction sets, operands."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import cpu_library
from kernels.hadamard_quantize.reference import Grid, Rotation
from kernels.ternary_matmul.layout import pack_planes
from robuq_bench.hadamard.transform import hadamard_factors, hadamard_matrix

SETS = cpu_library.INSTRUCTION_SETS
WIDTHS = (144, 384, 576, 768, 1152, 3456, 4608)
GRIDS = {
    "mid-tread": Grid("mean-mad", 0.42, -8, 7),
    "mid-rise": Grid("mean-mad", 1.25, -2, 1, floor=True),
    "one bit": Grid("mean-mad", 2.0, -1, 0, floor=True),
    "min-max": Grid("min-max", 1 / 255, -128, 127),
    "absmax": Grid("absmax", 1 / 127, -128, 127, epsilon=1e-5),
    "absmean": Grid("absmean", 1 / math.sqrt(7), -8, 7, epsilon=1e-5),
}


def force(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name not in available():
        pytest.skip(f"this CPU has no {name}")
    monkeypatch.setenv(cpu_library.SET_VARIABLE, name)


def available() -> tuple[str, ...]:
    return SETS[: cpu_library.best_instruction_set() + 1]


def operands(
    rows: int, outputs: int, width: int, *, seed: int = 0, **epilogue: Any
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Codes over the whole int8 range; `epilogue` says what to add: rank, gelu, per_image."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    codes = torch.randint(-128, 128, (rows, width), generator=generator, dtype=torch.int8)
    codes[: rows // 2] = -128  # sums as large as they get
    weight = torch.randint(-1, 2, (outputs, width), generator=generator, dtype=torch.int8)
    weight[: outputs // 2] = 1
    rest: dict[str, Any] = {
        "token_scale": normal(rows).abs() / width**0.5 / 64,
        "token_offset": normal(rows) / width**0.5,
        "code_sums": codes.sum(-1, dtype=torch.int32),
        "channel_scale": normal(outputs).abs() + 0.1,
        "weight_sums": weight.sum(-1, dtype=torch.int32),
        "out_dtype": torch.float32,
    }
    if rank := epilogue.get("rank", 0):
        rest |= {"branch": normal(rows, rank), "up": normal(outputs, rank) / 4}
    if epilogue.get("bias"):
        rest["bias"] = normal(outputs)
    if per_image := epilogue.get("per_image", 0):
        rest |= {
            "gate": normal(rows // per_image, outputs),
            "residual": normal(rows, outputs),
            "tokens_per_image": per_image,
        }
    rest["gelu"] = epilogue.get("gelu", False)
    return codes, pack_planes(weight), rest


def rotation_of(width: int) -> Rotation:
    m = hadamard_factors(width)[-1]
    m = min(width, 32) if m & (m - 1) == 0 else m
    return Rotation(hadamard_matrix(m).half(), width // m)


def tokens(rows: int, width: int, seed: int = 0) -> Tensor:
    """Rows of different mean and spread, with a few outlying channels."""
    generator = torch.Generator().manual_seed(rows * 10007 + width + seed)
    x = torch.randn(rows, width, generator=generator)
    x = x * (0.2 + torch.rand(rows, 1, generator=generator)) + 0.1
    x[:, :: max(1, width // 5)] *= 8
    return x


def signs_of(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(len(shape))
    return torch.randint(0, 2, shape, generator=generator).mul(2.0).sub(1.0)
