"""Plans without training on a DiT: packed bit for bit, and every byte as the account says."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from robuq_bench.accounting.account import packing_table
from robuq_bench.config import Plan, load_plan
from robuq_bench.config.workload import ModelConfig
from robuq_bench.errors import UsageError
from robuq_bench.inference import export_packed, load_packed, pack_
from robuq_bench.inference import prepare_for_inference as prepare
from robuq_bench.inference.packed_file import describe
from robuq_bench.inference.random_weights import pack_random_
from robuq_bench.models.dit import DiT
from robuq_bench.quantization.convert import quantize_

Students = Callable[[str], tuple[DiT, Plan]]
GROUPS = {
    "name": "groups",
    "layers": [
        {
            "kind": ["block", "adaLN"],
            "scaling": "smooth",
            "branch": {"method": "svd", "rank": 3},
            "weight": {"method": "rtn", "bits": 3, "group": 48, "symmetric": False},
            "activation": {"method": "rtn", "bits": 8},
        }
    ],
}
PLANS = ("rtn-w4a4", "quarot-w4a4", "groups")


@pytest.fixture(scope="module")
def students(teacher: DiT, inputs: tuple[Tensor, ...]) -> Students:
    """The quantized teacher by plan; each is made once, so that a test has to copy it."""

    @cache
    def made(name: str) -> tuple[DiT, Plan]:
        plan = Plan.model_validate(GROUPS) if name == "groups" else load_plan(name)
        model = quantize_(copy.deepcopy(teacher), plan, calibration=[inputs]).eval()
        return model, plan  # type: ignore[return-value]

    return made


@pytest.mark.parametrize("name", PLANS)
@torch.no_grad()
def test_a_plan_packs_bit_for_bit(
    students: Students,
    model_config: ModelConfig,
    inputs: tuple[Tensor, ...],
    tmp_path: Path,
    name: str,
) -> None:
    (model, plan), path = students(name), tmp_path / "m.safetensors"
    expected = model(*inputs)
    export_packed(pack_(copy.deepcopy(model)), path, plan=plan, model_config=model_config)
    loaded, facts = load_packed(path)
    assert torch.equal(loaded(*inputs), expected)
    bits = 3 if name == "groups" else 4
    shown = describe(path)
    assert shown["mean_weight_bits"] == dict.fromkeys(("qkv", "proj", "fc1", "fc2", "adaLN"), bits)
    assert shown["mean_activation_bits"]["adaLN"] == 8
    assert facts["bits_by_layer"]["blocks.0.mlp.fc1"] == (8 if name == "groups" else 4)
    for backend in ("integer", "triton"):
        with pytest.raises(
            UsageError, match=r"layer 'blocks\.0\..*method '(rtn|smooth)' is not comp"
        ):
            prepare(loaded, backend)
    prepared = prepare(loaded, "reference", torch.float32)
    assert torch.equal(prepared(*inputs), expected)


@pytest.mark.parametrize("floats", ["fp32/fp32", "fp16/fp32", "fp16/fp16", "int8/int8"])
@pytest.mark.parametrize("name", PLANS)
def test_the_account_predicts_every_byte(
    students: Students, model_config: ModelConfig, tmp_path: Path, name: str, floats: str
) -> None:
    model, plan = students(name)
    packed, path = pack_(copy.deepcopy(model)), tmp_path / "m.safetensors"
    table = export_packed(
        packed, path, plan=plan, model_config=model_config, storage=f"base3/{floats}"
    )
    rows = {row["part"]: row["bytes"] for row in table}
    said = {row["packing"]: row for row in packing_table(model_config, plan)}[f"dense/{floats}"]
    scales = rows["scales"] + rows.get("zero points", 0) + rows.get("other slots", 0)
    assert rows["uniform codes"] == said["codes_bytes"]
    assert scales == said["scales_bytes"]
    assert rows["low-rank branch"] == said["low_rank_bytes"]
    assert rows["signs"] == said["signs_bytes"]
    assert rows["biases of packed layers"] + rows["rest"] == said["rest_bytes"]
    total = said["total_bytes"] + rows["header (names, configuration)"]
    assert rows["total"] == total == path.stat().st_size
    parameters = sum(p.numel() for p in DiT.from_config(model_config).parameters())
    assert table[-1]["fp32_bytes"] == 4 * parameters, "of the model before packing"


def test_random_weights_are_for_what_kernels_know(model_config: ModelConfig) -> None:
    for name, method in (("rtn-w4a4", "weight method 'rtn'"), ("quarot-w4a4", "method 'gptq'")):
        model = DiT.from_config(model_config)
        with pytest.raises(UsageError, match=f"{method} of 'blocks.0.attn.qkv' has no random form"):
            pack_random_(model, load_plan(name))
        assert type(model.blocks[0].attn.qkv) is torch.nn.Linear, "nothing was changed"
