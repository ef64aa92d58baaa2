"""Files of other versions and forged files: read as they were, or refused by field and file.

Every damage here is signed anew, as a careful forger or another version would.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from robuq_bench.checkpointing import load_tensors, read_safetensors, save_tensors
from robuq_bench.config import load_plan
from robuq_bench.errors import CheckpointError, UsageError
from robuq_bench.inference import export_packed, load_packed, pack_
from robuq_bench.inference.packed_file import _digest, describe, size_table
from robuq_bench.quantization.convert import quantize_

ASSETS = Path(__file__).parent / "assets"
Content = tuple[dict[str, Tensor], dict[str, str]]


def sequential() -> nn.Module:
    layers = (nn.Linear(12, 24), nn.GELU(), nn.Linear(24, 12, bias=False), nn.LayerNorm(12))
    return nn.Sequential(*layers)


@torch.no_grad()
def test_files_of_format_1_load_and_compute_what_they_did() -> None:
    expected, _ = load_tensors(ASSETS / "v1-expected.safetensors")
    dit, facts = load_packed(ASSETS / "v1-dit.safetensors")
    assert (facts["source"], facts["storage"]) == ("format 1", "base3/int8/int8")
    assert facts["plan"].name == "a4"
    found = dit(expected["x"], expected["t"], expected["y"])
    torch.testing.assert_close(found, expected["dit"], rtol=1e-5, atol=1e-5)
    model, facts = load_packed(ASSETS / "v1-sequential.safetensors", into=sequential())
    assert facts["bits_by_layer"] == {"0": 4, "2": 4}
    found = model(expected["z"])
    torch.testing.assert_close(found, expected["sequential"], rtol=1e-5, atol=1e-5)


def test_models_that_format_1_can_hold_are_written_in_it(tmp_path: Path) -> None:
    source = ASSETS / "v1-sequential.safetensors"
    model, facts = load_packed(source, into=sequential())
    path = tmp_path / "m.safetensors"
    export_packed(model, path, plan=facts["plan"], storage=facts["storage"])
    (tensors, metadata), (expected, before) = read_safetensors(path), read_safetensors(source)
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], value) for name, value in expected.items())
    # A plan may have gained fields since.
    assert {k: v for k, v in metadata.items() if k not in ("plan", "sha256")} == {
        k: v for k, v in before.items() if k not in ("plan", "sha256")
    }


def test_tied_tensors_that_format_1_wrote_twice_are_tied_again(tmp_path: Path) -> None:
    def make(tie: bool = True) -> nn.Module:
        torch.manual_seed(0)
        model = nn.ModuleDict({k: nn.Embedding(3, 16) for k in "ab"} | {"layer": nn.Linear(16, 16)})
        model["b"].weight = model["a"].weight if tie else nn.Parameter(model["a"].weight + 1)
        return model

    path = tmp_path / "m.safetensors"
    plan = load_plan("a4")
    export_packed(pack_(quantize_(make(tie=False), plan)), path, plan=plan)
    with pytest.raises(CheckpointError, match=r"'b\.weight' and 'a\.weight' are one tensor"):
        load_packed(path, into=make())
    tensors, metadata = read_safetensors(path)
    tensors["b.weight"] = tensors["a.weight"].clone()
    write(path, (tensors, metadata))
    loaded, _ = load_packed(path, into=make())
    assert loaded["b"].weight is loaded["a"].weight


def write(path: Path, content: Content) -> None:
    tensors, metadata = content
    metadata = {key: text for key, text in metadata.items() if key != "sha256"}
    save_tensors(path, tensors, metadata | {"sha256": _digest(tensors, metadata)})


def read(name: str) -> Content:
    return read_safetensors(ASSETS / f"v1-{name}.safetensors")


def change(field: str, key: str, value: Any, layer: str = "0") -> Callable[[Content], None]:
    """Set one entry of a JSON field; of a layer's facts where the field is `layers`."""

    def apply(content: Content) -> None:
        values = json.loads(content[1][field])
        (values[layer] if field == "layers" else values)[key] = value
        content[1][field] = json.dumps(values)

    return apply


def put(key: str, text: str | None) -> Callable[[Content], None]:
    def apply(content: Content) -> None:
        if text is None:
            del content[1][key]
        else:
            content[1][key] = text

    return apply


def tensor(name: str, value: Callable[[Tensor], Tensor] | None) -> Callable[[Content], None]:
    def apply(content: Content) -> None:
        old = content[0].pop(name, torch.zeros(2, 2))
        if value is not None:
            content[0][name] = value(old)

    return apply


def with_nan(value: Tensor) -> Tensor:
    value = value.clone()
    value.view(-1)[0] = float("nan")
    return value


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change("plan", "fancy", 1), "plan is damaged: fancy: unknown key"),
        (
            change("plan", "activations", {"bits": 99}),
            r"plan is damaged: activations\.bits must be 1 to 8",
        ),
        (put("plan", "{"), "plan is not JSON"),
        (put("plan", "[]"), "plan is not a JSON object"),
        (put("plan", "[" * 100_000), "plan is not JSON"),
        (put("model", "7"), "model is not a JSON object"),
        (put("layers", "null"), "layers is not a JSON object"),
        (put("layers", '{"0": 3}'), r"layers\[0\] is not a JSON object"),
        (put("layers", None), "metadata lacks 'layers'"),
        (put("more", ""), "metadata has an unknown 'more'"),
        (put("storage", "base4/fp32/fp32"), "unknown 'base4'; did you mean 'base3'"),
        (put("parameters", "-1"), "parameters is '-1', not a number"),
        (put("parameters", "9" * 5000), "not a number"),
        (put("format_version", "4"), "format version 4, this code reads 1, 2 and 3"),
        *[
            (change("layers", "activation_bits", bits), r"layers\[0\].*activation_bits")
            for bits in (99, 0, -4, True, "4", "none", 4.5, [4], 10**30)
        ],
        (change("layers", "activation_quantizer", "bitnett"), "did you mean 'bitnet'"),
        (change("layers", "activation_quantizer", "none"), "without a quantizer"),
        (change("layers", "activation_quantizer", 4), "activation_quantizer"),
        (change("layers", "rotated", "yes"), r"layers\[0\].*rotated"),
        (change("layers", "more", 1), r"layers\[0\].*more"),
        (change("layers", "shape", [24]), r"shape must be \[out, in\]"),
        (change("layers", "shape", [24, -12]), r"shape must be \[out, in\]"),
        (change("layers", "shape", "24"), r"layers\[0\].*shape"),
        (change("layers", "shape", [12, 24]), r"hold \[24, 24\], not \[12, 24\]"),
        (change("layers", "shape", [24, 2**70]), "0"),
        (tensor("0.scale", with_nan), r"0\.scale has NaN or infinite values"),
        (tensor("0.scale", lambda t: t / 0), r"0\.scale has NaN or infinite values"),
        (tensor("0.scale", lambda t: torch.ones(7)), r"0\.scale is \[7\], not \[24\]"),
        (tensor("0.scale", lambda t: torch.ones(24).int()), r"0\.scale is torch\.int32"),
        (tensor("0.scale", None), r"'0\.scale' is missing"),
        (tensor("0.codes", None), r"'0\.codes' is missing"),
        (tensor("0.codes", lambda t: t.float()), "planes must be uint8"),
        (tensor("0.codes", lambda t: t | 255), "codes must be -1, 0 or 1"),
        (tensor("0.bias", lambda t: t[:3]), r"0\.bias is \[3\], not \[24\]"),
        (tensor("0.bias", None), "'0' is 24 x 12 with bias there, 24 x 12 without"),
        (tensor("0.low_rank_up", lambda t: torch.ones(24, 8)), "half a low-rank branch"),
        (tensor("0.signs", lambda t: torch.ones(2).byte()), "signs without a rotation"),
        (tensor("3.weight", with_nan), r"3\.weight has NaN or infinite values"),
        (tensor("3.weight", lambda t: t[:5]), r"3\.weight is \[5\], not \[12\]"),
        (tensor("3.weight", lambda t: t.to(torch.int8)), r"3\.weight is torch\.int8, not"),
        (tensor("3.weight", None), r"1 tensors missing \['3\.weight'\]"),
        (tensor("0.extra", lambda t: t), r"unexpected \['0\.extra'\]"),
        (tensor("4.weight", lambda t: t), r"unexpected \['4\.weight'\]"),
    ],
)
def test_forged_content_is_refused_by_field(
    damage: Callable[[Content], None], message: str, tmp_path: Path
) -> None:
    content = read("sequential")
    damage(content)
    path = tmp_path / "m.safetensors"
    write(path, content)
    into = sequential()
    with pytest.raises(CheckpointError, match=message) as caught:
        load_packed(path, into=into)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert all(type(layer) is nn.Linear for layer in (into[0], into[2])), "nothing was changed"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("tied", {"3.bias": "3.weight"}, r"say too much of '3\.bias'"),
        ("tied", {"1": "0"}, r"\['0', '1'\] are one layer in the file"),
        ("tied", {"9": "8"}, "unexpected"),
        ("tied", ["0"], "tied is not a JSON object"),
        ("tied", {"a": 1}, "tied must map names to text"),
        ("dtypes", {"0.codes": "int8"}, r"dtypes\[0\.codes\] is 'int8'"),
        ("dtypes", {"0.codes": ["float16"]}, "dtypes must map names to text"),
        ("dtypes", {"0.coves": "float16"}, r"say too much of '0\.coves'"),
    ],
)
def test_forged_names_and_dtypes_are_refused(
    key: str, value: Any, message: str, tmp_path: Path
) -> None:
    tensors, metadata = read("sequential")
    metadata |= {"format_version": "2", key: json.dumps(value)}
    write(tmp_path / "m.safetensors", (tensors, metadata))
    with pytest.raises(CheckpointError, match=message):
        load_packed(tmp_path / "m.safetensors", into=sequential())


@pytest.mark.parametrize(
    ("key", "value"),
    [("depth", 10**9), ("hidden_size", 2**62), ("num_classes", 2**63), ("input_size", 2**40)],
)
def test_a_model_that_cannot_be_built_is_refused(key: str, value: int, tmp_path: Path) -> None:
    content = read("dit")
    change("model", key, value)(content)
    write(tmp_path / "m.safetensors", content)
    with pytest.raises(CheckpointError, match=r"does not fit its model|model: "):
        load_packed(tmp_path / "m.safetensors")


# Words that mean something to a reader, and values of every JSON type.
WORDS = st.sampled_from(
    ["", "none", "fp32", "1", "2", "-1", "{}", "[]", "0", "0.codes", "bitnet", "NaN", "nan", "é"]
)
NUMBERS = st.integers(-3, 10) | st.sampled_from([99, 2**31, 2**63, 10**40])
SCALARS = st.none() | st.booleans() | NUMBERS | st.floats() | WORDS
VALUES = SCALARS | st.lists(SCALARS, max_size=3) | st.dictionaries(WORDS, SCALARS, max_size=2)


def mutate_json(draw: Callable[..., Any], node: Any) -> Any:
    """Change, drop or add something at a random depth of a JSON value."""
    if isinstance(node, dict) and node and draw(st.integers(0, 4)):
        key = draw(st.sampled_from(sorted(node)))
        if not draw(st.integers(0, 5)):
            return {name: value for name, value in node.items() if name != key}
        if not draw(st.integers(0, 5)):
            return node | {draw(WORDS): draw(VALUES)}
        return node | {key: mutate_json(draw, node[key])}
    return draw(VALUES)


def mutate_tensor(draw: Callable[..., Any], value: Tensor) -> Tensor:
    kind = draw(st.integers(0, 5))
    if kind == 0:
        return value.reshape(-1)[: draw(st.integers(0, 9))]
    if kind == 1:
        return value.to(
            draw(st.sampled_from([torch.int8, torch.int64, torch.half, torch.double, torch.bool]))
        )
    if kind == 2 and value.is_floating_point() and value.numel():
        value = value.clone()
        value.view(-1)[-1] = draw(st.sampled_from([float("nan"), float("inf"), -1e38]))
        return value
    if kind == 3:
        return value[None]
    return torch.randint(0, 256, value.shape, dtype=torch.uint8).to(value.dtype)


def mutate(draw: Callable[..., Any], content: Content) -> None:
    tensors, metadata = content
    if draw(st.booleans()):
        key = draw(st.sampled_from(sorted({*metadata, "tied", "dtypes"} - {"sha256"})))
        old = metadata.get(key) or "{}"
        if old.startswith("{") and draw(st.integers(0, 5)):
            metadata[key] = json.dumps(mutate_json(draw, json.loads(old)))
        else:
            metadata[key] = draw(WORDS)
        if key in ("tied", "dtypes"):
            metadata["format_version"] = "2"
        return
    name = draw(st.sampled_from(sorted(tensors)))
    action = draw(st.integers(0, 3))
    value = tensors[name]
    if action == 0:
        del tensors[name]
    elif action == 1:
        parts = ("codes", "scale", "signs", "bias", "low_rank_up", "low_rank_down", "int8_scale")
        tensors[f"{name.rpartition('.')[0]}.{draw(st.sampled_from(parts))}"] = value.clone()
    elif action == 2:
        tensors[f"{name}.int8_scale"] = torch.ones(3)
    else:
        tensors[name] = mutate_tensor(draw, value)


@given(data=st.data())
@torch.no_grad()
def test_any_forged_file_is_refused_or_a_model_that_runs(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / "forged.safetensors"
    name = data.draw(st.sampled_from(["sequential", "dit"]))
    content = read(name)
    for _ in range(data.draw(st.integers(1, 2))):
        mutate(data.draw, content)
    write(path, content)
    for look in (describe, size_table):
        with contextlib.suppress(CheckpointError):
            look(path)
    try:
        model, _ = load_packed(path, into=sequential() if name == "sequential" else None)
    except (CheckpointError, UsageError):
        return
    expected, _ = load_tensors(ASSETS / "v1-expected.safetensors")
    if name == "sequential":
        assert model(expected["z"]).shape == expected["sequential"].shape
    elif model.get_parameter("pos_embed").shape[1] == 16:
        assert model(expected["x"], expected["t"], expected["y"]).shape[0] == 2
