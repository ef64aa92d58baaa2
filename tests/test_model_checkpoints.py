"""Teachers from disk: verification, refusals, and conversion to and from diffusers' layout."""

from __future__ import annotations

import argparse
import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from robuq_bench.checkpointing import save_tensors
from robuq_bench.config import Workload, load_workload, resolve
from robuq_bench.errors import CheckpointError, ConfigError, MissingResourceError, UsageError
from robuq_bench.files import sha256_file
from robuq_bench.models.checkpoints import (
    build_model,
    from_diffusers,
    load_teacher,
    resolve_checkpoint,
    to_diffusers,
)
from robuq_bench.models.dit import DiT
from robuq_bench.weight_files import checkpoint_digest

TINY: dict[str, Any] = {"hidden_size": 24, "depth": 3, "num_heads": 2}
State = dict[str, Tensor]


def make_workload(checkpoint: Path | str = "", sha256: str = "", **model: Any) -> Workload:
    digits = load_workload("digits")
    teacher = digits.teacher.model_copy(update={"checkpoint": str(checkpoint), "sha256": sha256})
    section = digits.model.model_copy(update={**TINY, **model})
    return digits.model_copy(update={"teacher": teacher, "model": section})


def random_state(seed: int = 0, **model: Any) -> State:
    """Weights that are all different, so that no two tensors can be confused."""
    state = DiT.from_config(make_workload(**model).model).state_dict()
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in state.items():
        if name != "pos_embed":
            tensor.copy_(0.2 * torch.randn(tensor.shape, generator=generator))
    return state


def assert_same(actual: State, expected: State) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name


def as_safetensors(path: Path, state: State) -> Path:
    path = path.with_suffix(".safetensors")
    save_tensors(path, state, {})
    return path


def as_bare_pickle(path: Path, state: State) -> Path:
    path = path.with_suffix(".pt")
    torch.save(state, path)
    return path


def as_train_checkpoint(path: Path, state: State) -> Path:
    """What facebookresearch/DiT's train.py writes; `model` is not what one should load."""
    path = path.with_suffix(".pt")
    content = {
        "model": {name: tensor + 1 for name, tensor in state.items()},
        "ema": state,
        "opt": {"state": {0: {"step": 1}}, "param_groups": [{"lr": 1e-4}]},
        "args": argparse.Namespace(model="DiT-XL/2", image_size=256),
    }
    torch.save(content, path)
    return path


def as_diffusers(path: Path, state: State) -> Path:
    return as_safetensors(path, to_diffusers(state))


@pytest.mark.parametrize(
    "write", [as_safetensors, as_bare_pickle, as_train_checkpoint, as_diffusers]
)
def test_every_layout_gives_the_same_teacher(
    write: Callable[[Path, State], Path], tmp_path: Path
) -> None:
    state = random_state()
    path = write(tmp_path / "teacher", state)
    digest = sha256_file(path)
    random_numbers = torch.get_rng_state()
    for expected_sha256 in ("", digest):
        model, sha256 = load_teacher(make_workload(path, expected_sha256), "cpu")
        assert sha256 == digest
        assert_same(dict(model.state_dict()), state)
    assert not model.training
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["pos_embed"]
    # Loading must not disturb a seeded run.
    assert torch.equal(torch.get_rng_state(), random_numbers)


def prefixed(state: State, prefix: str) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def compiled_blocks(state: State) -> State:
    """Every block compiled or wrapped by itself, as FSDP and activation checkpointing do."""
    return {
        re.sub(r"^blocks\.(\d+)\.", r"_fsdp_wrapped_module.blocks.\1._orig_mod.", name): tensor
        for name, tensor in state.items()
    }


@pytest.mark.parametrize("layout", [dict, to_diffusers])
@pytest.mark.parametrize(
    "prefix",
    ["module.", "_orig_mod.", "module._orig_mod.", "dit.", "model.net.", "ema.module.dit."],
)
def test_a_prefix_that_all_names_have_is_left_out(
    prefix: str, layout: Callable[[State], State], tmp_path: Path
) -> None:
    state = random_state()
    content = {"ema": prefixed(layout(state), prefix), "step": 3}
    torch.save(content, tmp_path / "teacher.pt")
    model, _ = load_teacher(make_workload(tmp_path / "teacher.pt"), "cpu")
    assert_same(dict(model.state_dict()), state)


def test_wrappers_inside_names_are_left_out(tmp_path: Path) -> None:
    state = random_state()
    path = as_bare_pickle(tmp_path / "teacher", prefixed(compiled_blocks(state), "module.dit."))
    assert_same(dict(load_teacher(make_workload(path), "cpu")[0].state_dict()), state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state: prefixed(state, "dit.") | {"vae.weight": torch.zeros(1)},
            r"prefix 'dit\.', but 1 names do not: vae\.weight; save",
        ),
        (
            lambda state: prefixed(state, "ema.") | prefixed(state, "online."),
            r"2 models, with the prefixes 'ema\.', 'online\.'",
        ),
        (
            lambda state: state | prefixed(state, "ema_model."),
            r"2 models, with the prefixes '', 'ema_model\.'",
        ),
        (lambda state: state | prefixed(state, "module."), "twice, with and without .* prefix"),
    ],
)
def test_prefixes_that_leave_a_choice_are_refused(
    change: Callable[[State], State], message: str, tmp_path: Path
) -> None:
    path = as_bare_pickle(tmp_path / "teacher", change(random_state()))
    with pytest.raises(CheckpointError, match=message) as caught:
        load_teacher(make_workload(path), "cpu")
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("sharded", [False, True])
def test_a_folder_of_diffusers_gives_the_same_teacher(sharded: bool, tmp_path: Path) -> None:
    state, folder = random_state(), tmp_path / "dit" / "transformer"
    folder.mkdir(parents=True)
    theirs = {name: tensor.contiguous() for name, tensor in to_diffusers(state).items()}
    file = folder / "diffusion_pytorch_model.safetensors"
    if sharded:
        names = sorted(theirs)
        weight_map: dict[str, str] = {}
        for index, part in enumerate((names[::2], names[1::2])):
            shard = f"diffusion_pytorch_model-0000{index + 1}-of-00002.safetensors"
            save_tensors(folder / shard, {name: theirs[name] for name in part}, {})
            weight_map |= dict.fromkeys(part, shard)
        (folder / f"{file.name}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    else:
        save_tensors(file, theirs, {})
    (folder.parent / "model_index.json").write_text("{}")
    digests = set()
    for path in (folder, folder.parent):
        resolved = resolve("train-and-eval", "1", "a4", make_workload(path))
        model, digest = load_teacher(resolved.workload, "cpu")
        assert resolved.workload.teacher.sha256 == digest == checkpoint_digest(path)
        assert_same(dict(model.state_dict()), state)
        digests.add(digest)
    assert len(digests) == 1


def test_shipped_teacher_loads_and_denoises() -> None:
    workload = load_workload("digits")
    model, sha256 = load_teacher(workload, "cpu")
    path = resolve_checkpoint(workload)
    assert sha256 == sha256_file(path)
    assert path.with_name(f"{path.name}.sha256").read_text().startswith(sha256)
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        eps = model(x, torch.tensor([900, 999]), torch.tensor([3, 8]))
    # At the noisiest timesteps the input is almost the noise to be predicted.
    assert (eps - x).square().mean() < 0.1


def test_changing_the_teacher_leaves_its_file_alone(tmp_path: Path) -> None:
    path = as_bare_pickle(tmp_path / "teacher", random_state())
    before = sha256_file(path)
    model, _ = load_teacher(make_workload(path), "cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert sha256_file(path) == before


def test_half_precision_weights_are_loaded_in_single_precision(tmp_path: Path) -> None:
    state = random_state()
    halves = {name: tensor.half() for name, tensor in state.items()}
    model, _ = load_teacher(make_workload(as_bare_pickle(tmp_path / "t", halves)), "cpu")
    assert_same(dict(model.state_dict()), {name: half.float() for name, half in halves.items()})


def test_teacher_is_placed_on_the_device(tmp_path: Path) -> None:
    model, _ = load_teacher(make_workload(as_safetensors(tmp_path / "t", random_state())), "meta")
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def spoil_missing(state: State) -> str:
    for index in range(3):
        del state[f"blocks.{index}.attn.qkv.weight"]
        del state[f"blocks.{index}.attn.qkv.bias"]
    return r"6 missing: blocks\.0\.attn\.qkv\.bias, .* and 2 more"


def spoil_unexpected(state: State) -> str:
    state["blocks.3.attn.qkv.weight"] = torch.zeros(72, 24)
    return r"1 unexpected: blocks\.3\.attn\.qkv\.weight$"


def spoil_shape(state: State) -> str:
    state["y_embedder.embedding_table.weight"] = torch.zeros(10, 24)
    return r"1 of another shape: y_embedder\.embedding_table\.weight \[10, 24\] for \[11, 24\]"


def spoil_value(state: State) -> str:
    state["blocks.1.mlp.fc1.weight"][3, 4] = float("nan")
    return r"1 not finite: blocks\.1\.mlp\.fc1\.weight"


def spoil_name(state: State) -> str:
    state["blocks.1.attention.qkv.weight"] = state.pop("blocks.1.attn.qkv.weight")
    return (
        r"1 missing: blocks\.1\.attn\.qkv\.weight "
        r"\(there is blocks\.1\.attention\.qkv\.weight\); 1 unexpected"
    )


def spoil_integer(state: State) -> str:
    state["blocks.1.mlp.fc1.weight"] = state["blocks.1.mlp.fc1.weight"].to(torch.int8)
    return r"1 of a dtype that is not read: blocks\.1\.mlp\.fc1\.weight \(int8\)"


def spoil_float8(state: State) -> str:
    name = "blocks.1.mlp.fc1.weight"
    state[name] = state[name].to(torch.float8_e4m3fn)
    return r"1 of a dtype that is not read: blocks\.1\.mlp\.fc1\.weight \(float8_e4m3fn\)"


def spoil_range(state: State) -> str:
    name = "blocks.1.mlp.fc1.weight"
    state[name] = state[name].double()
    state[name][0, 0] = 1e200
    return r"1 not finite: blocks\.1\.mlp\.fc1\.weight"


SPOILS = [
    spoil_missing,
    spoil_unexpected,
    spoil_shape,
    spoil_value,
    spoil_name,
    spoil_integer,
    spoil_float8,
    spoil_range,
]


@pytest.mark.parametrize("spoil", SPOILS)
def test_unfit_weights_are_refused_by_name(spoil: Callable[[State], str], tmp_path: Path) -> None:
    state = random_state()
    expected = spoil(state)
    path = as_bare_pickle(tmp_path / "teacher", state)
    with pytest.raises(CheckpointError, match=expected) as caught:
        load_teacher(make_workload(path), "cpu")
    assert str(path) in str(caught.value)


def test_all_problems_are_told_at_once() -> None:
    state = random_state()
    for spoil in (spoil_missing, spoil_shape, spoil_value):
        spoil(state)
    with pytest.raises(CheckpointError) as caught:
        build_model(make_workload().model, state)
    for word in ("missing", "another shape", "not finite"):
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("transformer_blocks.0.attn1.to_k.weight", torch.zeros(24, 9), "of another shape"),
        ("transformer_blocks.0.attn1.to_k.weight", torch.zeros(24, 24).byte(), "not read"),
        ("pos_embed.proj.weight", torch.zeros(24), r"shape: pos_embed\.proj\.weight \[24\]"),
    ],
)
def test_weights_of_diffusers_that_do_not_fit_are_named(
    name: str, tensor: Tensor, message: str, tmp_path: Path
) -> None:
    state = to_diffusers(random_state()) | {name: tensor}
    path = as_bare_pickle(tmp_path / "teacher", state)
    with pytest.raises(CheckpointError, match=message):
        load_teacher(make_workload(path), "cpu")


@pytest.mark.parametrize("write", [as_safetensors, as_bare_pickle])
@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped", "wrong digest"])
def test_damaged_files_are_refused_by_name(
    write: Callable[[Path, State], Path], damage: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "teacher", random_state())
    digest = sha256_file(path)
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    else:
        digest = "0" * 64
    with pytest.raises(CheckpointError) as caught:
        load_teacher(make_workload(path, digest), "cpu")
    assert str(path) in str(caught.value)


class Malicious:
    """Unpickles by creating a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.target,))


@pytest.mark.parametrize("legacy", [False, True])
def test_malicious_pickle_is_refused_without_side_effect(legacy: bool, tmp_path: Path) -> None:
    target, path = tmp_path / "pwned", tmp_path / "teacher.pt"
    content = {"ema": random_state(), "args": Malicious(target)}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    # The pickle does what it says where it is trusted.
    pickle.loads(pickle.dumps(Malicious(target)))
    assert target.exists()
    target.unlink()
    with pytest.raises(CheckpointError, match=r"teacher\.pt was refused"):
        load_teacher(make_workload(path), "cpu")
    assert not target.exists()


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        ("", r"'digits' has no teacher checkpoint; .*train-teacher"),
        ("asset:digits_techer.safetensors", r"did you mean 'digits_teacher\.safetensors'"),
        ("asset:../sections.py", "ships no asset"),
    ],
)
def test_unknown_teachers_are_told_with_a_way_out(checkpoint: str, message: str) -> None:
    with pytest.raises(MissingResourceError, match=message):
        load_teacher(make_workload(checkpoint), "cpu")


def test_a_path_that_cannot_be_looked_at_is_a_usage_error() -> None:
    with pytest.raises(ConfigError, match="cannot be read: File name too long"):
        resolve("train-and-eval", "1", "a4", make_workload("a" * 300))


@pytest.fixture(scope="module")
def diffusers_shapes() -> dict[str, torch.Size]:
    """Names and shapes of diffusers' model with the tiny teacher's dimensions."""
    from robuq_bench._compat import import_torchvision

    import_torchvision()
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

    twin = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=1,
        out_channels=1,
        num_layers=3,
        sample_size=8,
        num_embeds_ada_norm=10,
    )
    return {name: tensor.shape for name, tensor in twin.state_dict().items()}


def test_converted_names_and_shapes_are_those_of_diffusers(
    diffusers_shapes: dict[str, torch.Size],
) -> None:
    converted = to_diffusers(random_state())
    assert {name: tensor.shape for name, tensor in converted.items()} == diffusers_shapes


def test_weights_of_diffusers_convert_to_a_loadable_teacher(
    diffusers_shapes: dict[str, torch.Size],
) -> None:
    generator = torch.Generator().manual_seed(0)
    theirs: State = {}
    for name, shape in diffusers_shapes.items():
        first_copy = re.sub(r"blocks\.\d+\.norm1\.emb", "blocks.0.norm1.emb", name)
        theirs[name] = theirs.get(first_copy, torch.randn(shape, generator=generator))
    model = build_model(make_workload().model, from_diffusers(theirs, 8))
    assert_same(to_diffusers(dict(model.state_dict())), theirs)


@pytest.mark.parametrize(
    "model",
    [{}, {"learn_sigma": True, "in_channels": 4}, {"class_dropout_prob": 0.0}, {"patch_size": 4}],
)
def test_round_trip_is_exact(model: dict[str, Any]) -> None:
    state = random_state(**model)
    assert_same(from_diffusers(to_diffusers(state), input_size=8), state)


def test_parts_land_where_diffusers_reads_them() -> None:
    state = random_state()
    converted = to_diffusers(state)
    q, k, v = state["blocks.1.attn.qkv.weight"].split(24)
    block = "transformer_blocks.1."
    for name, part in (("to_q", q), ("to_k", k), ("to_v", v)):
        assert torch.equal(converted[f"{block}attn1.{name}.weight"], part)
    # The null label stays the last row; shift and scale keep their order.
    table = converted[f"{block}norm1.emb.class_embedder.embedding_table.weight"]
    assert torch.equal(table[10], state["y_embedder.embedding_table.weight"][10])
    assert torch.equal(
        converted["proj_out_1.weight"], state["final_layer.adaLN_modulation.1.weight"]
    )
    assert torch.equal(converted["proj_out_2.weight"], state["final_layer.linear.weight"])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ({"transformer_blocks.2.norm1.emb.timestep_embedder.linear_1.bias": "change"}, "differ"),
        ({"transformer_blocks.2.norm1.emb.timestep_embedder.linear_1.bias": "drop"}, "1 missing"),
        ({"transformer_blocks.1.attn1.to_k.weight": "drop"}, "1 missing: .*to_k"),
        ({"proj_out_1.bias": "drop"}, "1 missing: proj_out_1.bias"),
        ({"transformer_blocks.5.attn1.to_k.weight": "add"}, "missing: transformer_blocks.3"),
        ({"norm_out.weight": "add"}, "1 unexpected: norm_out.weight"),
    ],
)
def test_foreign_diffusers_layouts_are_refused(spoil: dict[str, str], message: str) -> None:
    state = to_diffusers(random_state())
    for name, action in spoil.items():
        if action == "drop":
            del state[name]
        elif action == "add":
            state[name] = torch.zeros(24)
        else:
            state[name] = state[name] + 1
    with pytest.raises(CheckpointError, match=message):
        from_diffusers(state, input_size=8)


@pytest.mark.parametrize("convert", [to_diffusers, lambda state: from_diffusers(state, 8)])
def test_conversion_refuses_what_is_no_dit(convert: Callable[[State], State]) -> None:
    for state in ({}, {"conv.weight": torch.zeros(3)}):
        with pytest.raises(CheckpointError, match="missing"):
            convert(state)


def test_unfit_input_size_is_refused() -> None:
    with pytest.raises(UsageError, match="input_size 9"):
        from_diffusers(to_diffusers(random_state()), input_size=9)
