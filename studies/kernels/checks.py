"""Whether a kernel of `study kernels` computes what its reference defines.

`python -m studies.kernels.checks` reads cases as JSON lines and writes one check per line: the
study starts it with Triton's interpreter switched on, which has to happen before a kernel is
imported.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from studies.kernels.cases import (
    ATTENTION,
    FAKE,
    FAKE_BACKWARD,
    QUANTIZER,
    WEIGHT,
    Case,
    kernel_function,
    make_inputs,
)

# Of codes beside those of the reference: tokens rounded to fp16 for the transform move a value by
# about 3e-4 of its standard deviation, and 1 % of 8-bit codes by one.
MAX_CODE_STEP = 1
MAX_CODE_MISMATCH = 0.02
MAX_SCALE_ERROR = 1e-3  # relative
MAX_OFFSET_ERROR = 1e-2  # of the scale, which is one step of the grid
MAX_BRANCH_ERROR = 0.02  # of its root mean square
# One step of the output's dtype at the value, and at the root mean square for what cancels; of
# float32 more, whose sums are added in another order.
STEPS = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float32: 2.0**-16}
TRANSFORM_STEP = 2.0**-7  # of training's transforms, whose factors are fp16 products
ATTENTION_STEP = 2.0**-6  # of attention, where a value between two integers may go either way
MAX_WEIGHT_MISMATCH = 1e-3  # of ternary weights, those at the threshold


@dataclass(frozen=True)
class Check:
    """Whether a kernel agrees with its reference, and by what measure.

    `max_error` is in units of what is allowed, so at most 1 where `correct`; `failure` says what
    was out of bounds, or the error that was raised.
    """

    correct: bool
    max_error: float | None
    failure: str = ""


def check(case: Case, device: torch.device | str, seed: int = 0) -> Check:
    """Run kernel and reference on the same inputs, fresh memory filled with NaN."""
    try:
        inputs = make_inputs(case, device, seed)
        # TF32 would round the reference's integer sums.
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            expected = kernel_function(case, "reference")(**inputs)
        finally:
            torch.set_float32_matmul_precision(precision)
        with poisoned_memory():
            found = kernel_function(case, "triton")(**inputs)
        return judge(case, found, expected)
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:
        text = str(error).strip().splitlines() or [""]
        return Check(False, None, f"{type(error).__name__}: {text[0]}")


def judge(case: Case, found: Any, expected: Any) -> Check:
    """Whether the result of a kernel is that of its reference."""
    errors = deviations(case, found, expected)
    worst = max(errors, key=lambda name: math.inf if math.isnan(errors[name]) else errors[name])
    value = errors[worst]
    if value <= 1:  # written this way round, NaN fails
        return Check(True, value)
    finite = value if math.isfinite(value) else None
    return Check(False, finite, f"{worst} is {value:.3g} times what is allowed")


def deviations(case: Case, found: Any, expected: Any) -> dict[str, float]:
    """Every deviation of a kernel's result, divided by what is allowed."""
    if case.is_product:
        return {"product": _steps(found, expected)}
    if case.kernel == ATTENTION:
        return {"attention": _steps(found, expected, ATTENTION_STEP)}
    if case.kernel == FAKE_BACKWARD:
        return {"gradient": _steps(found, expected, TRANSFORM_STEP)}
    if case.kernel == WEIGHT:
        wanted = expected.float()
        differs = (found.float() - wanted).abs() > TRANSFORM_STEP * wanted.abs()
        # A NaN compares false: it has to be looked for.
        differs |= ~torch.isfinite(found)
        return {"share of differing weights": float(differs.double().mean()) / MAX_WEIGHT_MISMATCH}
    if case.kernel == FAKE:
        return _fake_deviations(case, found, expected)
    difference = (found.codes.int() - expected.codes.int()).abs()
    scale = expected.scale
    sums = found.codes.sum(-1, dtype=torch.int32)
    errors = {
        "largest code difference": _beyond(float(difference.max()), MAX_CODE_STEP),
        "share of differing codes": float((difference > 0).double().mean()) / MAX_CODE_MISMATCH,
        "scale": float(((found.scale - scale).abs() / scale).max()) / MAX_SCALE_ERROR,
        "offset": float(((found.offset - expected.offset).abs() / scale).max()) / MAX_OFFSET_ERROR,
        "code sum": math.inf if bool((sums != found.code_sums).any()) else 0.0,
    }
    if expected.branch is not None:
        wanted = expected.branch.float()
        size = wanted.square().mean().sqrt()
        worst = (found.branch.float() - wanted).abs().max() / size
        errors["low-rank branch"] = float(worst) / MAX_BRANCH_ERROR
    if expected.residual is not None:
        errors["residual sum"] = _steps(found.residual, expected.residual)
    return errors


def _beyond(value: float, allowed: float) -> float:
    """What is allowed as such counts nothing; more than that counts by how much."""
    return 0.0 if value <= allowed else value / allowed


def _fake_deviations(case: Case, found: Any, expected: Any) -> dict[str, float]:
    """Values on a grid: most agree, and those that do not are one step of the grid apart."""
    from robuq_bench.quantization.grids import grid_of

    wanted = expected.values.float()
    deviation = wanted - wanted.mean(-1, keepdim=True)
    # Mean absolute deviation of the values: that of the tokens, but for their rounding.
    step = deviation.abs().mean(-1, keepdim=True) * grid_of(QUANTIZER, case.bits).factor
    difference = (found.values.float() - wanted).abs()
    tolerance = TRANSFORM_STEP * wanted.abs() + 0.5 * step
    return {
        "share of differing values": float((difference > tolerance).double().mean())
        / MAX_CODE_MISMATCH,
        "largest step": float((difference / (1.5 * step + tolerance)).max()),
    }


def _steps(found: Tensor, expected: Tensor, step: float | None = None) -> float:
    """Largest deviation in steps of the dtype at the value plus the root mean square."""
    wanted = expected.float()
    step = STEPS[expected.dtype] if step is None else step
    allowed = step * (wanted.abs() + wanted.square().mean().sqrt())
    return float(((found.float() - wanted).abs() / allowed).max())


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Let `torch.empty` and its kin return NaN and extreme integers: unwritten output is seen."""

    def poison(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def poisoned(*args: Any, **kwargs: Any) -> Tensor:
            tensor = make(*args, **kwargs)
            if tensor.is_floating_point():
                return tensor.fill_(math.nan)
            return (
                tensor
                if tensor.dtype == torch.bool
                else tensor.fill_(torch.iinfo(tensor.dtype).max)
            )

        return poisoned

    kept = torch.empty, torch.empty_like, Tensor.new_empty
    torch.empty, torch.empty_like = poison(kept[0]), poison(kept[1])
    Tensor.new_empty = poison(kept[2])  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.empty, torch.empty_like = kept[0], kept[1]
        Tensor.new_empty = kept[2]  # type: ignore[method-assign]


def main() -> int:
    """Check the cases of standard input, one JSON object a line, in the interpreter."""
    from kernels.launch import INTERPRETED

    if not INTERPRETED:
        raise SystemExit("TRITON_INTERPRET=1 must be set: this checks kernels without a GPU")
    torch.set_num_threads(1)
    for line in sys.stdin:
        facts = json.loads(line)
        found = check(Case(**facts["case"]), "cpu", facts["seed"])
        print(json.dumps(asdict(found)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
