"""One file holds the model: bit for bit, every byte accounted for, and damage is noticed."""

from __future__ import annotations

import copy
import hashlib
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from making import changed, like, of
from torch import Tensor, nn

from robuq_bench.accounting.account import packing_table
from robuq_bench.checkpointing import read_safetensors, save_tensors, sidecar_path
from robuq_bench.config import Plan, load_plan
from robuq_bench.config.workload import ModelConfig
from robuq_bench.errors import CheckpointError, UsageError
from robuq_bench.inference import export_packed, load_packed, pack_
from robuq_bench.inference.packed_file import size_table
from robuq_bench.inference.packed_linear import packed_layers
from robuq_bench.inference.random_weights import pack_random_
from robuq_bench.models.dit import DiT
from robuq_bench.quantization.convert import quantize_

Inputs = tuple[Tensor, Tensor, Tensor]
Student = Callable[..., tuple[DiT, Plan]]


@pytest.fixture
def exported(student: Student, model_config: ModelConfig, tmp_path: Path) -> Path:
    model, plan = student("a2", mixed=True)
    path = tmp_path / "model.safetensors"
    export_packed(pack_(model), path, plan=plan, model_config=model_config, source="a test")
    return path


@pytest.mark.parametrize("codes", ["base3", "2bit"])
@pytest.mark.parametrize("name", ["a2", "a4", "a8", "baseline-a2", "bitnetv2-a4"])
@torch.inference_mode()
def test_a_loaded_model_computes_what_training_evaluates_bit_for_bit(
    student: Student,
    model_config: ModelConfig,
    inputs: Inputs,
    tmp_path: Path,
    name: str,
    codes: str,
) -> None:
    model, plan = student(name, mixed=name == "a2")
    expected = model(*inputs)
    path = tmp_path / "model.safetensors"
    packed = pack_(copy.deepcopy(model))
    export_packed(packed, path, plan=plan, model_config=model_config, storage=f"{codes}/fp32/fp32")
    loaded, facts = load_packed(path)
    assert torch.equal(loaded(*inputs), expected)
    assert torch.equal(packed(*inputs), expected)
    assert facts["plan"] == plan
    assert facts["bits_by_layer"] == {
        layer: module.activation_bits for layer, module in packed_layers(packed).items()
    }
    assert not loaded.training


@pytest.mark.parametrize("storage", ["base3/fp16/fp16", "2bit/fp16/fp32", "base3/int8/int8"])
@torch.inference_mode()
def test_what_fp16_and_int8_change_is_their_rounding_alone(
    student: Student, model_config: ModelConfig, inputs: Inputs, tmp_path: Path, storage: str
) -> None:
    model, plan = student("a4")
    path = tmp_path / "model.safetensors"
    export_packed(pack_(model), path, plan=plan, model_config=model_config, storage=storage)
    loaded, _ = load_packed(path)
    step = 1 / 127 / 2 if "int8" in storage else 2**-11
    exact, rounded = model.state_dict(), loaded.state_dict()
    assert exact.keys() == rounded.keys()
    for name, value in exact.items():
        if value.is_floating_point():
            largest = float(value.abs().max())
            assert float((rounded[name] - value).abs().max()) <= step * largest * 1.001, name
        else:
            assert torch.equal(rounded[name], value), name
    # Rounding twice changes nothing: the file is a fixed point.
    again = tmp_path / "again.safetensors"
    export_packed(loaded, again, plan=plan, model_config=model_config, storage=storage)
    twice, _ = load_packed(again)
    assert torch.allclose(twice(*inputs), loaded(*inputs), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("plan_name", ["a2", "baseline-a2", "bitnetv2-a4"])
@pytest.mark.parametrize(
    ("codes", "floats"),
    [*itertools.product(("base3", "2bit"), ("fp32/fp32", "fp16/fp32", "fp16/fp16")),
     ("base3", "int8/int8")],
)  # fmt: skip
def test_the_account_predicts_every_byte(
    student: Student,
    model_config: ModelConfig,
    tmp_path: Path,
    plan_name: str,
    codes: str,
    floats: str,
) -> None:
    model, plan = student(plan_name)
    storage = f"{codes}/{floats}"
    path = tmp_path / "model.safetensors"
    rows = {
        row["part"]: row["bytes"]
        for row in export_packed(
            pack_(model), path, plan=plan, model_config=model_config, storage=storage
        )
    }
    table = {row["packing"]: row for row in packing_table(model_config, plan)}
    expected = table[storage]
    assert rows["ternary codes"] == expected["codes_bytes"]
    assert rows["scales"] == expected["scales_bytes"]
    assert rows["low-rank branch"] == expected["low_rank_bytes"]
    assert rows["signs"] == expected["signs_bytes"]
    assert rows["biases of packed layers"] + rows["rest"] == expected["rest_bytes"]
    header = rows["header (names, configuration)"]
    assert rows["total"] == path.stat().st_size == expected["total_bytes"] + header


def test_the_size_reduction_counts_the_whole_file(exported: Path, teacher: DiT) -> None:
    total = size_table(exported)[-1]
    parameters = sum(parameter.numel() for parameter in teacher.parameters())
    assert total["fp32_bytes"] == 4 * parameters
    assert total["size_reduction"] == 4 * parameters / exported.stat().st_size
    assert sum(row["percent"] for row in size_table(exported)[:-1]) == pytest.approx(100)


def test_equal_models_make_equal_files(
    student: Student, model_config: ModelConfig, tmp_path: Path
) -> None:
    digests = []
    for name in ("a", "b"):
        model, plan = student("a4")
        path = tmp_path / f"{name}.safetensors"
        export_packed(pack_(model), path, plan=plan, model_config=model_config)
        digests.append(hashlib.sha256(path.read_bytes()).hexdigest())
        assert sidecar_path(path).read_text().startswith(digests[-1])
    assert digests[0] == digests[1]


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 0.999])
def test_a_truncated_file_is_refused_by_name(exported: Path, fraction: float) -> None:
    content = exported.read_bytes()
    exported.write_bytes(content[: int(len(content) * fraction)])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load_packed(exported)


@pytest.mark.parametrize("place", [0.02, 0.3, 0.6, 0.95])
def test_one_flipped_bit_is_noticed_without_the_sidecar(exported: Path, place: float) -> None:
    sidecar_path(exported).unlink()
    content = bytearray(exported.read_bytes())
    content[int(len(content) * place)] ^= 1
    exported.write_bytes(bytes(content))
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load_packed(exported)


def _rewrite(path: Path, **changes: Any) -> None:
    """Change metadata and sign it anew, as a careful forger or another version would."""
    from robuq_bench.inference.packed_file import _digest

    tensors, metadata = read_safetensors(path)
    metadata.pop("sha256")
    drop = changes.pop("drop", None)
    tensors = {name: value for name, value in tensors.items() if name != drop}
    metadata |= changes
    save_tensors(path, tensors, metadata | {"sha256": _digest(tensors, metadata)})


def test_files_of_other_kinds_are_told_apart(exported: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    save_tensors(other, {"a": torch.zeros(1)}, {})
    with pytest.raises(CheckpointError, match="is no packed model; make one with"):
        load_packed(other)
    with pytest.raises(CheckpointError, match="missing"):
        load_packed(tmp_path / "missing.safetensors")
    _rewrite(exported, format_version="99")
    with pytest.raises(CheckpointError, match="format version 99"):
        load_packed(exported)


def test_a_file_that_does_not_fit_its_model_is_refused(exported: Path) -> None:
    _rewrite(exported, drop="blocks.0.attn.qkv.scale")
    with pytest.raises(CheckpointError, match=r"does not fit its model.*blocks\.0\.attn\.qkv"):
        load_packed(exported)


def test_a_missing_tensor_of_the_rest_is_named(exported: Path) -> None:
    _rewrite(exported, drop="final_layer.linear.weight")
    with pytest.raises(CheckpointError, match=r"1 tensors missing \['final_layer\.linear\.weight"):
        load_packed(exported)


def test_what_cannot_be_exported_is_said_before_anything_is_written(
    student: Student, teacher: DiT, model_config: ModelConfig, tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    plan = load_plan("a4")
    with pytest.raises(UsageError, match="no packed layers; call pack_ first"):
        export_packed(teacher, path, plan=plan)
    with pytest.raises(UsageError, match="no quantized layers; convert it with quantize_"):
        pack_(copy.deepcopy(teacher))
    model = pack_(student("a4")[0])
    with pytest.raises(UsageError, match="unknown 'base4'; did you mean 'base3'"):
        export_packed(model, path, plan=plan, storage="base4/fp16/fp16")
    with pytest.raises(UsageError, match="is not CODES/LOW_RANK/REST"):
        export_packed(model, path, plan=plan, storage="base3")
    with torch.no_grad():
        model.get_parameter("final_layer.linear.bias").fill_(1e6)
    with pytest.raises(UsageError, match=r"final_layer\.linear\.bias has a value beyond fp16"):
        export_packed(model, path, plan=plan, storage="base3/fp32/fp16")
    assert not path.exists()


def test_weights_kept_in_full_precision_cannot_be_packed(student: Student) -> None:
    model, _ = student(changed("a4", "block", weight="none"))
    with pytest.raises(UsageError, match=r"blocks\.0\.attn\.qkv.*quantizes its activations"):
        pack_(model)


@torch.inference_mode()
def test_a_model_of_diffusers_goes_into_an_instance(tmp_path: Path) -> None:
    from robuq_bench._compat import import_torchvision

    import_torchvision()
    from diffusers import DiTTransformer2DModel

    def make() -> torch.nn.Module:
        torch.manual_seed(0)
        return DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=24, in_channels=1, num_layers=1,
            sample_size=8, patch_size=2, num_embeds_ada_norm=10, norm_num_groups=1,
        ).eval()  # fmt: skip

    plan = load_plan("a4")
    model = make()
    quantize_(model, plan)
    inputs = {
        "hidden_states": torch.randn(2, 1, 8, 8),
        "timestep": torch.tensor([5, 900]),
        "class_labels": torch.tensor([1, 2]),
    }
    expected = model(**inputs).sample
    path = tmp_path / "model.safetensors"
    export_packed(pack_(model), path, plan=plan)
    with pytest.raises(UsageError, match="pass an instance as into="):
        load_packed(path)
    loaded, _ = load_packed(path, into=make())
    assert torch.equal(loaded(**inputs).sample, expected)
    with pytest.raises(CheckpointError, match="does not fit its model"):
        load_packed(path, into=torch.nn.Linear(2, 2))


def test_an_instance_of_another_model_is_refused(tmp_path: Path) -> None:
    def network(hidden: int, bias: bool = True) -> nn.Module:
        return nn.Sequential(nn.Linear(48, hidden, bias), nn.GELU(), nn.Linear(hidden, 48))

    model, plan = network(144), load_plan("a4")
    quantize_(model, plan)
    path = tmp_path / "model.safetensors"
    export_packed(pack_(model), path, plan=plan)
    for other, message in (
        (nn.Sequential(nn.Linear(48, 144)), "'2'|no attribute"),
        (network(48), r"'0' is 48 x 48 with bias there, 144 x 48 with in the file"),
        (network(144, bias=False), "'0' is 144 x 48 without bias there"),
        (nn.Sequential(nn.GELU(), nn.GELU(), nn.GELU()), "'0' is a GELU there"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load_packed(path, into=other)
    load_packed(path, into=network(144))


@torch.inference_mode()
def test_random_weights_have_the_sizes_of_real_ones(
    student: Student, model_config: ModelConfig, inputs: Inputs, tmp_path: Path
) -> None:
    model, plan = student("a2")
    sizes = []
    for index, packed in enumerate(
        (pack_(model), pack_random_(DiT.from_config(model_config), plan))
    ):
        path = tmp_path / f"{index}.safetensors"
        rows = export_packed(packed, path, plan=plan, model_config=model_config)
        sizes.append({row["part"]: row["bytes"] for row in rows[:6]})
        assert bool(torch.isfinite(packed(*inputs)).all())
    assert sizes[0] == sizes[1]
    with pytest.raises(UsageError, match="quantizes no layer"):
        pack_random_(DiT.from_config(model_config), load_plan("fp"))


def test_a_branch_can_be_kept_to_some_layers(student: Student) -> None:
    plan = load_plan("a4")
    mlp = like(of(plan, "block"), name="mlp", match="*mlp*")
    only_mlp = changed(changed(plan, rank=0), first=[mlp])
    ranks = {name: layer.rank for name, layer in packed_layers(pack_(student(only_mlp)[0])).items()}
    assert {rank for name, rank in ranks.items() if "mlp" in name} == {2}
    assert {rank for name, rank in ranks.items() if "mlp" not in name} == {0}
