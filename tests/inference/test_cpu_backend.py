"""Backend "cpu": the codes and integer sums of "integer", by whatever instructions the CPU has."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from compiled import available
from making import changed
from torch import Tensor

from kernels import cpu_library
from kernels.hadamard_quantize import reference as quantization
from kernels.launch import KernelInputError
from kernels.ternary_matmul import int_mm, reference
from kernels.ternary_matmul.layout import pack_planes
from robuq_bench.config import Plan
from robuq_bench.errors import UsageError
from robuq_bench.inference import pack_, prepare_for_inference
from robuq_bench.inference.packed_linear import PackedLinear, packed_layers
from robuq_bench.inference.prepare import weight_bytes
from robuq_bench.models.dit import DiT
from robuq_bench.quantization.grids import grid_of, kernel_rotation

Inputs = tuple[Tensor, Tensor, Tensor]
Student = Callable[..., tuple[DiT, Plan]]


@pytest.fixture(params=["as the CPU is", "without _int_mm"])
def instructions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the CPU has, and a CPU without integer instructions; no compiled kernels."""
    monkeypatch.setenv(cpu_library.PATH_VARIABLE, "off")
    if request.param == "without _int_mm":
        monkeypatch.setattr(int_mm, "has_fast_int_mm", lambda: False)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def operands(rows: int, outputs: int, width: int, rank: int = 0) -> dict[str, Tensor]:
    """Operands of `ternary_matmul` with unpacked planes; codes reach both ends of int8."""
    generator = torch.Generator().manual_seed(rows * width + outputs)
    codes = torch.randint(-128, 128, (rows, width), dtype=torch.int8, generator=generator)
    codes[:, 0], codes[:, -1] = -128, 127
    planes = torch.randint(-1, 2, (outputs, width), dtype=torch.int8, generator=generator)
    given = {
        "codes": codes,
        "planes": planes,
        "token_scale": torch.rand(rows, generator=generator),
        "token_offset": torch.randn(rows, generator=generator),
        "code_sums": codes.sum(1, dtype=torch.int32),
        "channel_scale": torch.rand(outputs, generator=generator),
        "weight_sums": planes.sum(1, dtype=torch.int32),
    }
    if rank:
        given["branch"] = torch.randn(rows, rank, generator=generator)
        given["up"] = torch.randn(outputs, rank, generator=generator)
        given["bias"] = torch.randn(outputs, generator=generator)
    return given


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("width", [1, 35, 144, 384, 576, 768, 1152, 3456, 4608])
@pytest.mark.parametrize("rows", [1, 2, 17, 256])
def test_integer_sums_are_exact(rows: int, width: int) -> None:
    for outputs in (37, 136):
        given = operands(rows, outputs, width)
        codes, planes = given["codes"], given["planes"]
        expected = codes.numpy().astype(np.int64) @ planes.numpy().astype(np.int64).T
        found = int_mm.integer_product(codes, planes).numpy()
        assert np.array_equal(found.astype(np.int64), expected)
        planes.fill_(1)  # the largest sums
        found = int_mm.integer_product(codes.fill_(-128), planes).numpy()
        assert np.array_equal(found, np.full((rows, outputs), -128.0 * width))


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("rows", [1, 34, 256])
@pytest.mark.parametrize("rank", [0, 16])
@pytest.mark.parametrize("kind", ["plain", "gelu", "gate"])
def test_epilogues_agree_with_the_reference(
    monkeypatch: pytest.MonkeyPatch, rows: int, rank: int, kind: str
) -> None:
    monkeypatch.setattr(int_mm, "AT_ONCE", 20 * 136)  # parts that do not end with an image
    given = operands(rows, 136, 144, rank)
    options = {"gelu": kind == "gelu", "out_dtype": torch.float32}
    if kind == "gate":
        images = 2 if rows > 1 else 1
        given["gate"], given["residual"] = torch.randn(images, 136), torch.randn(rows, 136)
        options["tokens_per_image"] = rows // images
    found = int_mm.ternary_matmul(**given, **options)
    packed = given | {"planes": pack_planes(given["planes"])}
    expected = reference.ternary_matmul(**packed, **options)
    assert float((found - expected).abs().max()) <= 1e-6 * float(expected.abs().max())
    half = int_mm.ternary_matmul(**given, **options | {"out_dtype": torch.bfloat16})
    assert torch.equal(half, found.bfloat16())


@pytest.mark.usefixtures("instructions")
def test_groups_are_the_layers_one_by_one() -> None:
    layers = [operands(3, 48, 144, rank=4), operands(3, 48, 144, rank=4)]
    layers[1]["planes"] = -layers[1]["planes"]
    stacked = {name: torch.stack([layer[name] for layer in layers]) for name in layers[0]}
    found = int_mm.grouped_ternary_matmul(**stacked, out_dtype=torch.float32)
    for layer, one in zip(layers, found, strict=True):
        assert torch.equal(one, int_mm.ternary_matmul(**layer, out_dtype=torch.float32))


@pytest.mark.parametrize("groups", [0, 3])
def test_tokens_are_quantized_alike_in_parts_and_at_once(
    monkeypatch: pytest.MonkeyPatch, groups: int
) -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(30, 144, generator=generator)
    shift, scale = torch.randn(2, 2, 144, generator=generator)
    signs = torch.randn(*([groups] * (groups > 0)), 144, generator=generator).sign()
    down = torch.randn(*signs.shape[:-1], 4, 144, generator=generator)
    options = {
        "rotation": kernel_rotation(144, x.device),
        "signs": signs,
        "modulation": quantization.Modulation(scale, shift, 15),
        "down": down,
    }
    grid = grid_of("robust-midtread", 8)
    whole = quantization.hadamard_quantize(x, grid, **options)
    monkeypatch.setattr(quantization, "AT_ONCE", 7 * 144)
    parts = quantization.hadamard_quantize(x, grid, **options)
    assert parts.codes.shape == whole.codes.shape
    assert int((parts.codes.int() - whole.codes.int()).abs().max()) <= 1
    for name in ("scale", "offset", "branch"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name))
    assert torch.equal(parts.code_sums, parts.codes.sum(-1, dtype=torch.int32))


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("name", ["a8", "a4", "a2-uniform", "baseline-a2", "bitnetv2-a4"])
@torch.inference_mode()
def test_every_layer_has_the_codes_and_outputs_of_integer(student: Student, name: str) -> None:
    model = pack_(student(name)[0])
    integer = packed_layers(prepare_for_inference(copy.deepcopy(model), "integer", fuse=False))
    fast = packed_layers(prepare_for_inference(model, "cpu", fuse=False))
    generator = torch.Generator().manual_seed(0)
    for layer_name, layer in integer.items():
        x = torch.randn(2, 30, layer.in_features, generator=generator)
        tokens = x.view(60, -1)
        found_tokens = fast[layer_name].quantize(tokens)
        for one, other in zip(layer.quantize(tokens), found_tokens, strict=True):
            assert one is other is None or torch.equal(one, other), layer_name
        expected, found = layer(x), fast[layer_name](x)
        assert found.shape == expected.shape
        difference = (found - expected).abs().max()
        assert float(difference) <= 1e-6 * float(expected.abs().max()), layer_name


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("name", ["a8", "a4", "a2-uniform", "baseline-a2", "bitnetv2-a4"])
@torch.inference_mode()
def test_every_layer_by_compiled_kernels(student: Student, name: str) -> None:
    """A rotated sum within its rounding of a threshold may have the next code."""
    model = pack_(student(name)[0])
    integer = packed_layers(prepare_for_inference(copy.deepcopy(model), "integer", fuse=False))
    fast = packed_layers(prepare_for_inference(model, "cpu", fuse=False))
    generator = torch.Generator().manual_seed(0)
    for layer_name, layer in integer.items():
        assert fast[layer_name].arithmetic == "compiled"
        tokens = torch.randn(60, layer.in_features, generator=generator)
        expected, found = layer.quantize(tokens), fast[layer_name].quantize(tokens)
        moved = (found.codes.int() - expected.codes.int()).abs()
        assert int(moved.max()) <= 1, layer_name
        assert float(moved.float().mean()) <= 1e-3, layer_name
        torch.testing.assert_close(found.scale, expected.scale)
        torch.testing.assert_close(found.offset, expected.offset)
        one, other = (
            by.product(expected, out_dtype=torch.float32) for by in (layer, fast[layer_name])
        )
        assert float((one - other).abs().max()) <= 1e-6 * float(one.abs().max()), layer_name


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("arithmetic", ["compiled", "int-mm"])
@pytest.mark.parametrize("name", ["a4", "a8"])
@torch.inference_mode()
def test_a_model_is_the_same_whatever_instructions_and_threads(
    student: Student,
    inputs: Inputs,
    monkeypatch: pytest.MonkeyPatch,
    threads: Callable[[int], None],
    arithmetic: str,
    name: str,
) -> None:
    if arithmetic == "int-mm":
        monkeypatch.setenv(cpu_library.PATH_VARIABLE, "off")
    model, _ = student(name)
    assert model.blocks[0].attn.matmul_quantizer is not None
    integer = prepare_for_inference(copy.deepcopy(model), "integer")(*inputs)
    prepared = prepare_for_inference(model, "cpu")
    assert prepared.blocks.modulations.arithmetic == arithmetic
    threads(1)
    found = prepared(*inputs)
    # A code that lies on a threshold may move by what an earlier sum rounds otherwise.
    assert float((found - integer).norm() / integer.norm()) < 0.02
    threads(2)
    assert torch.equal(prepared(*inputs), found)
    if arithmetic == "int-mm":
        monkeypatch.setattr(int_mm, "has_fast_int_mm", lambda: False)
        assert torch.equal(prepared(*inputs), found)
        return
    for instructions in available()[1:]:  # without multiply-add the branch is rounded otherwise
        monkeypatch.setenv(cpu_library.SET_VARIABLE, instructions)
        assert torch.equal(prepared(*inputs), found), instructions


def test_a_library_that_was_asked_for_and_is_not_there_is_an_error(
    student: Student, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(cpu_library.PATH_VARIABLE, "/nowhere/_cpu.so")
    with pytest.raises(cpu_library.MissingKernels, match=r"/nowhere/_cpu\.so cannot be loaded"):
        prepare_for_inference(student("a4")[0], "cpu")


def test_integer_instructions_are_used_where_vnni_is(monkeypatch: pytest.MonkeyPatch) -> None:
    given = operands(2, 8, 16)
    for has_vnni, dtype in ((True, torch.int32), (False, torch.float32)):
        monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda has=has_vnni: has)
        expected = dtype if torch.backends.mkldnn.is_available() else torch.float32
        assert int_mm.integer_product(given["codes"], given["planes"]).dtype == expected
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not int_mm.has_fast_int_mm()


def test_the_default_is_cpu_where_every_layer_can(student: Student) -> None:
    def chosen(model: DiT, **options: object) -> set[str]:
        prepared = prepare_for_inference(model, **options)
        return {layer.backend for layer in packed_layers(prepared).values()}

    assert chosen(student("a4")[0]) == {"cpu"}
    assert chosen(student("a4")[0], backend="reference") == {"reference"}
    assert chosen(student(changed("a4", activation="lloyd-max"))[0]) == {"reference"}
    assert chosen(student("rtn-w4a4")[0]) == {"reference"}
    assert chosen(student("a4")[0].bfloat16()) == {"reference"}


def test_unpacked_weights_take_a_byte_each_and_are_not_saved(
    student: Student, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(cpu_library.PATH_VARIABLE, "off")
    model = pack_(student("a4")[0])
    plain = weight_bytes(model)
    names = set(model.state_dict())
    layers = packed_layers(prepare_for_inference(model, "cpu", fuse=False)).values()
    weights = sum(layer.out_features * layer.in_features for layer in layers)
    assert weight_bytes(model) == plain + weights
    assert set(model.state_dict()) == names
    fused = prepare_for_inference(pack_(student("a4")[0]), "cpu")
    integer = prepare_for_inference(pack_(student("a4")[0]), "integer")
    assert weight_bytes(fused) == weight_bytes(integer) + weights
    prepare_for_inference(model, "integer", fuse=False)
    assert weight_bytes(model) == plain


def test_a_missing_library_is_said_and_a_switched_off_one_is_not(
    student: Student,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv(cpu_library.PATH_VARIABLE, "off")
    prepare_for_inference(student("a4")[0], "cpu")
    assert not caplog.records
    monkeypatch.delenv(cpu_library.PATH_VARIABLE)
    monkeypatch.setattr(cpu_library, "LIBRARY", tmp_path / "_cpu.so")
    cpu_library._load.cache_clear()
    try:
        prepare_for_inference(student("a4")[0], "cpu")
    finally:
        cpu_library._load.cache_clear()
    (record,) = caplog.records
    assert "run python -m kernels.build" in record.getMessage()
    assert "`study kernels --device cpu` times both" in record.getMessage()


@pytest.mark.usefixtures("library")
def test_compiled_kernels_read_the_packed_weights(student: Student) -> None:
    model = pack_(student("a4")[0])
    plain = weight_bytes(model)
    assert weight_bytes(prepare_for_inference(model, "cpu", fuse=False)) == plain


def test_what_is_not_on_a_cpu_or_too_wide_is_refused() -> None:
    layer = PackedLinear(torch.zeros(4, 12, dtype=torch.int8), torch.ones(4), None, name="a")
    with pytest.raises(UsageError, match=r"the model is on meta; move it with \.cpu\(\)"):
        prepare_for_inference(torch.nn.Sequential(layer.to("meta")), "cpu")
    wide = operands(1, 1, reference.EXACT_WIDTH)
    with pytest.raises(KernelInputError, match=r"on a CPU: K = 65536 is not exact"):
        int_mm.ternary_matmul(**wide)
    elsewhere = {name: value.to("meta") for name, value in operands(2, 3, 4).items()}
    with pytest.raises(KernelInputError, match="codes are on meta; this one runs on a CPU only"):
        int_mm.ternary_matmul(**elsewhere)
