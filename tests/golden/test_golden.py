"""Every packaged plan computes what was recorded before the layer was made of slots.

The recordings are of torch alone, so the compiled CPU kernels, which round differently, are
switched off; a test of their own holds them to the outputs that were recorded.
On a machine with the recorded fingerprint bit for bit. Elsewhere sums round differently, and a
value that sat on the border between two codes falls to the other side; there, norms and outputs are
compared within tolerances, which ATEN_CPU_CAPABILITY=default exercises on any machine.
"""

from __future__ import annotations

import importlib
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from kernels import cpu_library

HERE = Path(__file__).parent
#: Relative, for other machines than the recorded one. Measured between AVX-512 and no vectors at
#: all: norms 1e-5 where nothing ran through the network and 2e-2 where something did, outputs 7e-3
#: in L2, losses of single steps 0.14 (codes that flip are noise, and QAT amplifies it).
NORM_TOLERANCE = {"gradients": 5e-2, "averaged": 5e-2, "other": 1e-4}
OUTPUT_TOLERANCE = 1.5e-2
STEP_LOSS_TOLERANCE, MEAN_LOSS_TOLERANCE = 0.3, 0.08
RECORD: dict[str, Any] = json.loads((HERE / "assets" / "golden.json").read_text())
PLANS = list(RECORD["plans"])

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def compute() -> Iterator[Any]:
    """`compute.py`, which stands beside this file and is no package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(HERE))
        patch.setenv(cpu_library.PATH_VARIABLE, "off")
        yield importlib.import_module("compute")


@pytest.fixture(scope="module")
def is_recorded_machine(compute: Any) -> bool:
    return compute.fingerprint() == RECORD["fingerprint"]


@pytest.fixture(scope="module")
def recorded() -> dict[str, Tensor]:
    return load_file(HERE / "assets" / "golden.safetensors")


@pytest.fixture(scope="module", params=PLANS)
def plan(request: pytest.FixtureRequest) -> str:
    """All tests of one plan come before those of the next: what it computes is needed once."""
    return str(request.param)


@pytest.fixture(scope="module")
def teacher(compute: Any) -> nn.Module:
    return compute.library.teacher()


@pytest.fixture(scope="module")
def computed(
    compute: Any, recorded: dict[str, Tensor], teacher: nn.Module, plan: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The plan's record and outputs of today."""
    inputs = {
        name.removeprefix("inputs/"): value
        for name, value in recorded.items()
        if name.startswith("inputs/")
    }
    return compute.of_plan(plan, teacher, inputs)


def differing(found: Any, expected: Any, tolerance: float, where: str = "") -> list[str]:
    """Where two records differ, with both values; without a tolerance in any bit."""
    if isinstance(expected, dict):
        if not isinstance(found, dict) or found.keys() != expected.keys():
            names = sorted(set(found) ^ set(expected))
            return [f"{where}: only on one side: {', '.join(names[:5])}"]
        inner = [differing(found[k], expected[k], tolerance, f"{where}/{k}") for k in expected]
        return [line for lines in inner for line in lines]
    if isinstance(expected, str) and tolerance:
        norms = float(found.split()[1]), float(expected.split()[1])
        is_same = math.isclose(*norms, rel_tol=tolerance, abs_tol=1e-6)
    else:
        is_same = found == expected
    return [] if is_same else [f"{where}: {found} was {expected}"]


@pytest.mark.parametrize(
    "part", ["bits", "layers", "parameters", "gradients", "packed_files", "averaged"]
)
def test_a_plan_gives_the_recorded_tensors(
    computed: Any, is_recorded_machine: bool, plan: str, part: str
) -> None:
    found, expected = computed[0][part], RECORD["plans"][plan][part]
    assert expected
    tolerance = NORM_TOLERANCE.get(part, NORM_TOLERANCE["other"])
    lines = differing(found, expected, 0.0 if is_recorded_machine else tolerance)
    assert not lines, "\n".join([f"{len(lines)} differ", *lines[:10]])


@pytest.mark.parametrize("mode", ["training", "eval", "packed"])
def test_a_plan_gives_the_recorded_outputs(
    computed: Any, recorded: dict[str, Tensor], is_recorded_machine: bool, plan: str, mode: str
) -> None:
    name = f"{plan}/{mode}"
    found, expected = computed[1][name], recorded[name]
    assert found.shape == (40, 1, 8, 8)
    if is_recorded_machine:
        assert torch.equal(found, expected), f"largest difference {(found - expected).abs().max()}"
    else:
        assert float((found - expected).norm() / expected.norm()) < OUTPUT_TOLERANCE


def test_qat_follows_the_recorded_losses(
    computed: Any, is_recorded_machine: bool, plan: str
) -> None:
    found, expected = computed[0]["losses"], RECORD["plans"][plan]["losses"]
    assert len(expected) == 20
    if is_recorded_machine:
        assert found == expected
    else:
        ours = [float.fromhex(loss) for loss in found]
        theirs = [float.fromhex(loss) for loss in expected]
        assert ours == pytest.approx(theirs, rel=STEP_LOSS_TOLERANCE)
        assert sum(ours) == pytest.approx(sum(theirs), rel=MEAN_LOSS_TOLERANCE)


def test_every_method_gives_the_recorded_tensors(compute: Any, is_recorded_machine: bool) -> None:
    tolerance = 0.0 if is_recorded_machine else NORM_TOLERANCE["other"]
    lines = differing(compute.of_methods(), RECORD["methods"], tolerance)
    assert not lines, "\n".join(lines)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("plan", PLANS)
def test_the_compiled_kernels_give_the_recorded_outputs(
    compute: Any, recorded: dict[str, Tensor], plan: str
) -> None:
    """Within what another machine may differ by, and not by chance to the bit."""
    inputs = [recorded[f"inputs/{name}"] for name in ("x", "t", "y", "output_gradient")]
    student, _ = compute.student_for(plan, compute.library.teacher())
    output = student.train()(*inputs[:3])
    output.backward(inputs[3])
    expected = recorded[f"{plan}/training"]
    assert not torch.equal(output, expected)
    assert float((output - expected).detach().norm() / expected.norm()) < OUTPUT_TOLERANCE
    gradients = {
        key: compute.print_of(value.grad)
        for key, value in compute.library.parameters(student).items()
        if value.grad is not None
    }
    lines = differing(gradients, RECORD["plans"][plan]["gradients"], NORM_TOLERANCE["gradients"])
    assert not lines, "\n".join([f"{len(lines)} differ", *lines[:10]])


def test_the_recordings_tell_the_plans_apart(recorded: dict[str, Tensor]) -> None:
    """What is within the tolerance of one plan is not within that of another."""
    for plan, other in itertools.combinations(PLANS, 2):
        ours, theirs = recorded[f"{plan}/eval"], recorded[f"{other}/eval"]
        assert float((ours - theirs).norm() / theirs.norm()) > OUTPUT_TOLERANCE, (plan, other)
