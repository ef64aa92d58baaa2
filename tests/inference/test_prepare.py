"""The arithmetics agree, fused or not, on our DiT and on diffusers' models."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from making import changed, rule
from torch import Tensor, nn

from kernels.hadamard_quantize.reference import hadamard_quantize
from robuq_bench.config import Plan, load_plan
from robuq_bench.errors import ConfigError, UsageError
from robuq_bench.hadamard.transform import hadamard_matrix
from robuq_bench.inference import PackedLinear, pack_, prepare_for_inference
from robuq_bench.inference.fused_blocks import FusedBlocks, attend
from robuq_bench.inference.packed_linear import packed_layers
from robuq_bench.inference.prepare import weight_bytes
from robuq_bench.methods.activations._token_grid import token_grid
from robuq_bench.models.dit import Attention, DiT
from robuq_bench.quantization.attention import matmul_quantizer
from robuq_bench.quantization.convert import quantize_
from robuq_bench.quantization.grids import grid_of, kernel_rotation

Inputs = tuple[Tensor, Tensor, Tensor]
Student = Callable[..., tuple[DiT, Plan]]

UNIFORM = [
    (name, bits)
    for name in ("robust-midtread", "robust-midrise", "minmax", "bitnet")
    for bits in range(1, 9)
    if (name, bits) != ("bitnet", 1)
]


def distance(a: Tensor, b: Tensor) -> float:
    """Relative RMS distance."""
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize(("name", "bits"), UNIFORM)
def test_a_grid_gives_the_codes_of_its_quantizer(name: str, bits: int) -> None:
    tokens = torch.randn(40, 144, generator=torch.Generator().manual_seed(bits)) * 3 + 0.5
    expected = token_grid(name).quantize(tokens, bits)
    found = hadamard_quantize(tokens, grid_of(name, bits), rotation=None)
    assert torch.equal(found.code_sums, expected.codes.sum(1, dtype=torch.int32))
    assert torch.equal(found.codes, expected.codes)
    assert torch.allclose(found.scale, expected.scale[:, 0], rtol=1e-6, atol=0)
    assert torch.allclose(found.offset, expected.offset[:, 0], rtol=1e-5, atol=1e-6)


def test_grids_refuse_what_integer_products_cannot_use() -> None:
    with pytest.raises(UsageError, match=r"'lloyd-max' has levels that are not evenly spaced"):
        grid_of("lloyd-max", 2)
    with pytest.raises(UsageError, match="activations are not quantized"):
        grid_of("none", 8)
    with pytest.raises(ConfigError, match="takes 2 to 8 bits"):
        grid_of("bitnet", 1)


@pytest.mark.parametrize("n", [48, 144, 384, 576, 768, 1024, 1152])
def test_kernel_rotations_are_the_suites_matrix(n: int) -> None:
    rotation = kernel_rotation(n, torch.device("cpu"))
    inner = rotation.inner.double()
    sylvester = hadamard_matrix(rotation.outer)
    assert torch.equal(torch.kron(sylvester, inner), hadamard_matrix(n))


def test_widths_of_two_paley_factors_are_refused() -> None:
    width = next(n for n in range(16, 40000, 16) if n % 9 == 0 and _paley_factors(n) == 2)
    with pytest.raises(UsageError, match=rf"width {width} has the Hadamard factors"):
        kernel_rotation(width, torch.device("cpu"))


def _paley_factors(n: int) -> int:
    from robuq_bench.hadamard.transform import hadamard_factors, is_supported

    return sum(f & (f - 1) != 0 for f in hadamard_factors(n)) if is_supported(n) else 0


@pytest.mark.parametrize("name", ["a8", "a4", "a2-uniform", "baseline-a2", "bitnetv2-a4"])
@torch.inference_mode()
def test_integer_products_agree_with_dequantized_ones(student: Student, name: str) -> None:
    model, _ = student(name)
    reference = packed_layers(pack_(model))
    integer = packed_layers(prepare_for_inference(copy.deepcopy(model), "integer", fuse=False))
    generator = torch.Generator().manual_seed(0)
    for layer_name, layer in reference.items():
        x = torch.randn(2, 30, layer.in_features, generator=generator)
        expected, found = layer(x), integer[layer_name](x)
        assert found.shape == expected.shape
        same = torch.isclose(found, expected, rtol=1e-4, atol=1e-4).all(-1)
        # Statistics summed in another order may move a code that lies on a threshold.
        assert float(same.float().mean()) >= 0.9, layer_name
        assert distance(found, expected) < 0.02, layer_name


@pytest.mark.parametrize("name", ["a4", "a2"])
@torch.inference_mode()
def test_fused_blocks_compute_what_the_blocks_do(
    student: Student, inputs: Inputs, name: str
) -> None:
    model, _ = student(name, mixed=name == "a2")
    expected = model(*inputs)
    separate = prepare_for_inference(copy.deepcopy(model), "integer", fuse=False)(*inputs)
    fused_model = prepare_for_inference(copy.deepcopy(model), "integer")
    assert isinstance(fused_model.blocks, FusedBlocks)
    assert fused_model.blocks.modulations is not None
    fused = fused_model(*inputs)
    assert distance(fused, separate) < 0.02
    assert distance(fused, expected) < 0.05
    wrong = fused_model(inputs[0], inputs[1].flip(0), inputs[2])
    assert distance(wrong, fused) > 0.05, "the modulation must reach the blocks"


@torch.inference_mode()
def test_blocks_without_quantized_modulation_are_fused_too(
    student: Student, inputs: Inputs
) -> None:
    model, _ = student(changed("a4", first=[rule("kept", kind="adaLN")]))
    expected = model(*inputs)
    fused = prepare_for_inference(model, "integer")
    assert fused.blocks.modulations is None
    assert distance(fused(*inputs), expected) < 0.05


@torch.inference_mode()
def test_half_precision_keeps_the_scales(student: Student, inputs: Inputs) -> None:
    model, _ = student("a8")
    expected = model(*inputs)
    prepared = prepare_for_inference(model, "integer", torch.bfloat16)
    scales = [layer.scale for layer in packed_layers(prepared).values()]
    assert {scale.dtype for scale in scales} == {torch.float32}
    x, t, y = inputs
    found = prepared(x.bfloat16(), t, y)
    assert found.dtype == torch.bfloat16
    assert distance(found.float(), expected) < 0.1


@pytest.mark.parametrize("backend", ["integer", "cpu"])
@torch.inference_mode()
def test_linears_of_diffusers_are_exchanged(backend: str) -> None:
    from robuq_bench._compat import import_torchvision

    import_torchvision()
    from diffusers import PixArtTransformer2DModel

    torch.manual_seed(0)
    model = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=24, in_channels=1, out_channels=2, num_layers=1,
        cross_attention_dim=48, sample_size=8, patch_size=2, caption_channels=12,
        norm_num_groups=1, use_additional_conditions=False,
    ).eval()  # fmt: skip
    quantize_(model, load_plan("a8"))
    inputs = {
        "hidden_states": torch.randn(2, 1, 8, 8),
        "encoder_hidden_states": torch.randn(2, 4, 12),
        "timestep": torch.tensor([5, 900]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }
    expected = model(**inputs).sample
    prepared = prepare_for_inference(model, backend)
    assert all(layer.backend == backend for layer in packed_layers(prepared).values())
    assert distance(prepared(**inputs).sample, expected) < 0.02


def test_attention_in_a_fused_block_is_what_training_evaluates() -> None:
    attention = Attention(144, 2)
    attention.qkv.arithmetic = "integer"
    qkv = torch.randn(2, 49, 432)
    for quantizer in (matmul_quantizer(8), matmul_quantizer(4), None, torch.tanh):
        attention.matmul_quantizer = quantizer
        assert distance(attend(attention, qkv), attention.attend(qkv)) < 1e-3
    assert distance(attend(attention, qkv), attention.attend(qkv)) == 0  # not one of ours


class Halved(Attention):
    def attend(self, qkv: Tensor) -> Tensor:
        return super().attend(qkv) / 2


def test_an_attend_of_the_callers_own_is_called() -> None:
    qkv = torch.randn(2, 49, 432)
    for attention in (Halved(144, 2), Attention(144, 2)):
        attention.qkv.arithmetic = "integer"
        attention.matmul_quantizer = matmul_quantizer(8)
        if type(attention) is Attention:
            attention.attend = lambda qkv, whole=attention.attend: whole(qkv) / 2
        assert torch.equal(attend(attention, qkv), attention.attend(qkv))


def test_packing_shrinks_what_is_held_in_memory(student: Student, teacher: DiT) -> None:
    model, _ = student("a2")
    packed = prepare_for_inference(model, "integer")
    ternary = sum(
        layer.out_features * layer.in_features for layer in packed_layers(packed).values()
    )
    full = weight_bytes(teacher)
    assert full == 4 * sum(parameter.numel() for parameter in teacher.parameters())
    # Two bits a weight in place of 32, rows of 144 padded to 256, and a rank-8 branch besides.
    assert weight_bytes(packed) < full - 4 * ternary * 0.6


def test_errors_name_the_layer_and_the_way_out(student: Student, teacher: DiT) -> None:
    with pytest.raises(UsageError, match="no quantized layers; convert it with quantize_"):
        prepare_for_inference(copy.deepcopy(teacher))
    model, _ = student("a4")
    with pytest.raises(UsageError, match="unknown backend 'cuda'; choose from reference"):
        prepare_for_inference(model, "cuda")
    uneven, _ = student(changed("a4", activation="lloyd-max"))
    with pytest.raises(UsageError, match=r"blocks\.0\..*'lloyd-max'.*backend \"reference\""):
        prepare_for_inference(uneven, "integer")
    prepared = prepare_for_inference(model, "integer")
    with pytest.raises(UsageError, match="prepared already"):
        prepare_for_inference(prepared, "reference")
    layer = next(iter(packed_layers(prepared).values()))
    with pytest.raises(UsageError, match="takes 144 features"):
        layer(torch.zeros(1, 7))


def test_layers_without_quantized_activations_run_on_the_reference_alone() -> None:
    codes = torch.randint(-1, 2, (5, 12), dtype=torch.int8)
    layer = PackedLinear(
        codes, torch.full((5,), 0.5), None,
        name="a", activation_quantizer="none", activation_bits=None, rotated=False,
    )  # fmt: skip
    x = torch.randn(3, 12)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, codes * 0.5))
    with pytest.raises(UsageError, match="layer 'a', backend 'integer': activations are not"):
        prepare_for_inference(nn.Sequential(layer), "integer")
