"""Forged files of format 3, signed anew: refused by field and file, and nothing is imported."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from robuq_bench.checkpointing import read_safetensors, save_tensors
from robuq_bench.config import Plan
from robuq_bench.errors import CheckpointError
from robuq_bench.inference import export_packed, load_packed, pack_
from robuq_bench.inference.packed_file import _digest, describe, size_table
from robuq_bench.methods import register_method
from robuq_bench.methods.weights.rtn import Rtn
from robuq_bench.quantization.convert import quantize_

Content = tuple[dict[str, Tensor], dict[str, str]]
Damage = Callable[[Content], None]
PLAN = Plan.model_validate(
    {
        "name": "a-test",
        "layers": [
            {
                "name": "first",
                "match": ["0"],
                "kind": ["block", "adaLN", "other"],
                "scaling": "smooth",
                "rotation": {"method": "dual-rotation", "block": 4, "steps": 4},
                "weight": {"method": "rtn", "bits": 3, "group": 4, "symmetric": False},
                "activation": {"method": "percentile", "bits": 6},
            },
            {
                "name": "second",
                "kind": ["block", "adaLN", "other"],
                "rotation": {"method": "randomized-hadamard"},
                "branch": {"method": "svd", "rank": 2},
                "weight": {"method": "lsq", "bits": 4},
                "activation": {"method": "lsq", "bits": 4},
            },
        ],
    }
)


def make() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 12), nn.LayerNorm(12)).eval()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("packed") / "m.safetensors"
    model = quantize_(make(), PLAN, calibration=[torch.randn(32, 12)])
    export_packed(pack_(model), path, plan=PLAN)
    return path


def write(path: Path, content: Content) -> None:
    tensors, metadata = content
    metadata = {key: text for key, text in metadata.items() if key != "sha256"}
    save_tensors(path, tensors, metadata | {"sha256": _digest(tensors, metadata)})


def layer(key: str, value: Any, name: str = "0") -> Damage:
    def apply(content: Content) -> None:
        layers = json.loads(content[1]["layers"])
        layers[name][key] = value
        content[1]["layers"] = json.dumps(layers)

    return apply


def rule(index: int, slot: str, value: Any) -> Damage:
    def apply(content: Content) -> None:
        plan = json.loads(content[1]["plan"])
        plan["layers"][index][slot] = value
        content[1]["plan"] = json.dumps(plan)

    return apply


def version(text: str) -> Damage:
    return lambda content: content[1].__setitem__("format_version", text)


def tensor(name: str, change: Callable[[Tensor], Tensor] | None) -> Damage:
    def apply(content: Content) -> None:
        old = content[0].pop(name, torch.ones(2, 12))
        if change is not None:
            content[0][name] = change(old)

    return apply


def with_nan(value: Tensor) -> Tensor:
    return torch.full_like(value, float("nan"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (version("2"), r"layers\[0\]: .*rule"),
        (
            layer("rule", "frist"),
            "the plan has no rule 'frist'; did you mean 'first'",
        ),
        (layer("rule", 1), r"layers\[0\].*rule"),
        (layer("rule", "second"), "has other signs or another rank than rule 'second'"),
        (layer("rule", "first", "2"), r"layers\[2\]|2 has"),
        (layer("weight_bits", None), r"layers\[0\]: rule 'first' does not make weights ternary"),
        (layer("weight_bits", 9), r"layers\[0\].*weight_bits"),
        (layer("weight_bits", 1), r"layers\[0\].*weight_bits"),
        (layer("weight_bits", True), r"layers\[0\].*weight_bits"),
        (layer("weight_bits", 4), r"0\.codes: \[20, 12\] codes of 4 bits take uint8 \[120\]"),
        (layer("activation_bits", 1), r"layers\[0\]: activation method 'percentile' takes 2 to 8"),
        (layer("activation_bits", 9), r"layers\[0\]: activation method 'percentile' takes 2 to 8"),
        (layer("activation_bits", "6"), r"layers\[0\].*activation_bits"),
        (layer("activation_bits", 3, "2"), "step is learned for 4 bits and cannot serve 3"),
        (layer("shape", [20, 13]), r"0\.codes: \[20, 13\] codes of 3 bits take uint8 \[98\]"),
        (layer("shape", [20, 2**40]), r"0\.codes: .* codes of 3 bits take uint8"),
        (layer("shape", [16, 15]), "0: dual rotation: the block size 4 does not divide"),
        (layer("shape", [20]), r"shape must be \[out, in\]"),
        (layer("shape", [10, 24]), r"0\.scaling\.scale is \[12\], not \[24\]|'0' is 20 x 12"),
        (layer("more", 1), r"layers\[0\].*more"),
        (rule(0, "weight", None), "rule 'first' does not make weights of 3 bits"),
        (rule(0, "weight", "ternary-twn"), "rule 'first' does not make weights of 3 bits"),
        (
            rule(0, "weight", {"method": "rtn", "bits": 3}),
            r"0 has 120 scales and zero points, 20 by",
        ),
        (rule(0, "weight", {"method": "rtn", "bits": 3, "group": 4}), "120 scales.*, 60 by 'rtn'"),
        (rule(0, "weight", {"method": "rnt"}), "did you mean 'rtn'"),
        (rule(0, "scaling", None), r"unexpected \['0\.scaling\.scale'\]"),
        (
            rule(0, "rotation", {"method": "dual-rotation", "block": 6}),
            r"0\.rotation\.first is \[3, 4",
        ),
        (rule(0, "rotation", {"method": "block-hadamard", "block": 4}), r"unexpected.*0\.rotation"),
        (rule(0, "rotation", "hadamard"), r"unexpected.*0\.rotation\.first"),
        (rule(0, "activation", None), r"layers\[0\]: activation_bits 6 without a quantizer"),
        (rule(1, "branch", {"method": "svd", "rank": 3}), "another rank than rule 'second'"),
        (rule(1, "rotation", "hadamard"), "has other signs"),
        (rule(1, "name", "first"), r"plan.*'first'"),
        (tensor("0.codes", None), r"'0\.codes' is missing"),
        (tensor("0.codes", lambda t: t[:-1]), r"0\.codes: .* take uint8 \[90\]"),
        (tensor("0.codes", lambda t: t.view(2, -1)), r"0\.codes: .* take uint8 \[90\]"),
        (tensor("0.codes", lambda t: t.to(torch.int8)), r"0\.codes: .* take uint8 \[90\]"),
        (tensor("0.scale", None), r"'0\.scale' is missing"),
        (tensor("0.scale", lambda t: t[:-1]), "119 scales and zero points, 120 by 'rtn'"),
        (tensor("0.scale", with_nan), r"0\.scale has NaN"),
        (tensor("0.zero", with_nan), r"0\.zero has NaN"),
        (tensor("0.zero", None), "60 scales and zero points, 120 by 'rtn'"),
        (tensor("0.zero", lambda t: t.int()), r"0\.zero is torch\.int32"),
        (tensor("2.zero", lambda t: t), r"2 has 36 scales and zero points, 12 by 'lsq'"),
        (tensor("0.scaling.scale", None), r"'0\.scaling\.scale' is missing"),
        (tensor("0.scaling.scale", with_nan), r"0\.scaling\.scale has NaN"),
        (tensor("0.scaling.scale", lambda t: t[:7]), r"0\.scaling\.scale is \[7\], not \[12\]"),
        (tensor("0.scaling.scale", lambda t: t.int()), r"0\.scaling\.scale is torch\.int32"),
        (tensor("0.scaling.scale", lambda t: t.byte()), r"12 signs take uint8 \[2\]"),
        (tensor("0.scaling.more", lambda t: t), r"unexpected \['0\.scaling\.more'\]"),
        (tensor("0.rotation.permutation", lambda t: t + 5), "0.rotation cannot be computed"),
        (tensor("0.rotation.permutation", lambda t: t.float()), "permutation is torch.float32"),
        (tensor("0.rotation.permutation", lambda t: t.int()), "permutation is torch.int32, not"),
        (tensor("0.activation.low", lambda t: t[None]), r"0\.activation\.low is \[1\], not \[\]"),
        (tensor("2.activation.step", None), r"'2\.activation\.step' is missing"),
        (tensor("2.signs", None), "has other signs"),
        (tensor("2.signs", lambda t: t[:1]), r"20 signs take uint8 \[3\]"),
        (tensor("2.low_rank_up", lambda t: t[:5]), r"2\.low_rank_up is \[5, 2\], not \[12, 2\]"),
        (tensor("2.low_rank_up", None), "half a low-rank branch"),
        (tensor("0.low_rank_down", lambda t: t), "another rank than rule 'first'"),
    ],
)
def test_forged_content_is_refused_by_field(
    damage: Damage, message: str, exported: Path, tmp_path: Path
) -> None:
    content = read_safetensors(exported)
    damage(content)
    path = tmp_path / "m.safetensors"
    write(path, content)
    into = make()
    with pytest.raises(CheckpointError, match=message) as caught:
        load_packed(path, into=into)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert all(type(layer) is nn.Linear for layer in (into[0], into[2])), "nothing was changed"


@pytest.mark.parametrize("value", ["evil_plan:Method", {"method": "evil_plan:Method"}])
def test_a_file_names_no_code_to_import(
    value: Any, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "evil_plan.py").write_text("raise AssertionError('imported by a packed file')\n")
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "m.safetensors"
    for slot in ("weight", "activation", "scaling"):
        content = read_safetensors(exported)
        rule(0, slot, value)(content)
        write(path, content)
        for read in (describe, size_table, lambda path: load_packed(path, into=make())):
            with pytest.raises(CheckpointError, match="a method from outside the suite"):
                read(path)
    content = read_safetensors(exported)
    facts = {"shape": [20, 12], "activation_bits": 4, "rotated": False}
    named = {**facts, "activation_quantizer": "evil_plan:Method"}
    content[1]["layers"] = json.dumps({"0": named})
    write(path, content)
    with pytest.raises(CheckpointError, match="a method from outside the suite"):
        load_packed(path, into=make())
    assert "evil_plan" not in sys.modules


def test_a_method_registered_in_this_process_is_none_of_the_file(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("robuq_bench.methods._registered", {})
    register_method("mine", Rtn)
    path, content = tmp_path / "m.safetensors", read_safetensors(exported)
    rule(0, "weight", {"method": "mine", "bits": 3, "group": 4, "symmetric": False})(content)
    write(path, content)
    with pytest.raises(CheckpointError, match="weight method 'mine' is not one of the suite"):
        load_packed(path, into=make())


# Values of every JSON type, and words that mean something to a reader.
WORDS = st.sampled_from(["", "none", "first", "second", "rtn", "lsq", "svd", "weight", "0.codes"])
SCALARS = st.none() | st.booleans() | st.integers(-3, 10) | st.floats() | WORDS
VALUES = SCALARS | st.lists(SCALARS, max_size=3) | st.dictionaries(WORDS, SCALARS, max_size=2)


def mutated(draw: Callable[..., Any], node: Any) -> Any:
    """Change, drop or add something at a random depth of a JSON value."""
    if isinstance(node, list) and node and draw(st.integers(0, 4)):
        index = draw(st.integers(0, len(node) - 1))
        return [*node[:index], mutated(draw, node[index]), *node[index + 1 :]]
    if isinstance(node, dict) and node and draw(st.integers(0, 6)):
        key = draw(st.sampled_from(sorted(node)))
        action = draw(st.integers(0, 5))
        if action == 0:
            return {name: value for name, value in node.items() if name != key}
        if action == 1:
            return node | {draw(WORDS): draw(VALUES)}
        return node | {key: mutated(draw, node[key])}
    return draw(VALUES)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_damage_is_a_checkpoint_error(
    exported: Path, tmp_path: Path, data: st.DataObject
) -> None:
    tensors, metadata = read_safetensors(exported)
    if data.draw(st.booleans()):
        field = data.draw(st.sampled_from(["layers", "plan", "dtypes"]))
        metadata[field] = json.dumps(mutated(data.draw, json.loads(metadata.get(field, "{}"))))
    else:
        name = data.draw(st.sampled_from(sorted(tensors)))
        kind = data.draw(st.integers(0, 4))
        value = tensors.pop(name)
        if kind == 1:
            tensors[name] = value.reshape(-1)[: data.draw(st.integers(0, 9))]
        elif kind == 2:
            dtypes = [torch.int8, torch.uint8, torch.int64, torch.half, torch.double, torch.bool]
            tensors[name] = value.to(data.draw(st.sampled_from(dtypes)))
        elif kind == 3:
            tensors[name] = value[None]
        elif kind == 4:
            owner = data.draw(st.sampled_from(["0.", "2.", "0.scaling.", "2.activation.", ""]))
            tensors[name] = value
            tensors[owner + data.draw(st.sampled_from(["zero", "scale", "step"]))] = value.clone()
    path = tmp_path / "m.safetensors"
    write(path, (tensors, metadata))
    with contextlib.suppress(CheckpointError):
        loaded, _ = load_packed(path, into=make())
        assert loaded(torch.zeros(1, 12)).shape == make()(torch.zeros(1, 12)).shape
