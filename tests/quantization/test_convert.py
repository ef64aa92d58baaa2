"""`quantize_` on our DiT and on diffusers' transformers: which layers, which errors."""

from __future__ import annotations

import pytest
import torch
from making import changed, rule
from torch import nn

from robuq_bench._compat import import_torchvision
from robuq_bench.config import load_plan
from robuq_bench.errors import ConfigError, UsageError
from robuq_bench.hadamard.transform import UnsupportedHadamardOrder
from robuq_bench.models.dit import DiT
from robuq_bench.quantization.convert import (
    allocatable_layers,
    layer_type,
    quantize_,
    quantized_layers,
    set_activation_bits,
)
from robuq_bench.quantization.linear import QuantizedLinear

KINDS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


def dit(hidden_size: int = 48) -> DiT:
    torch.manual_seed(0)
    return DiT(
        input_size=4,
        in_channels=1,
        hidden_size=hidden_size,
        depth=2,
        num_heads=2,
        num_classes=3,
        learn_sigma=False,
    )


def run(model: DiT) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 1, 4, 4, generator=generator)
    return model(x, torch.tensor([1, 500, 999]), torch.tensor([0, 1, 3]))


def test_robuq_converts_the_four_linears_and_adaln_of_every_block() -> None:
    model = quantize_(dit(), load_plan("a4"))
    expected = {f"blocks.{i}.{kind}" for i in range(2) for kind in KINDS}
    adaln = {f"blocks.{i}.adaLN_modulation.1" for i in range(2)}
    assert set(quantized_layers(model)) == expected | adaln
    assert set(allocatable_layers(model)) == expected
    for name, layer in quantized_layers(model).items():
        chosen = {slot: method.method for slot, method in layer.methods.items()}
        assert chosen == {
            "rotation": "randomized-hadamard",
            "branch": "svd",
            "weight": "ternary-twn",
            "activation": "robust-midtread",
        }, name
        assert layer.activation_bits == 4, name
        assert ("activation" in layer.chooses) == (name not in adaln)
        for module in (layer.rotation, layer.branch, layer.weight_quantizer):
            assert module is not None
    for untouched in ("x_embedder.proj", "t_embedder.mlp.0", "final_layer.linear"):
        assert not isinstance(model.get_submodule(untouched), QuantizedLinear)


def test_adaln_keeps_its_own_bits() -> None:
    model = quantize_(dit(), load_plan("a2-uniform"))
    bits = {name: layer.activation_bits for name, layer in quantized_layers(model).items()}
    assert {value for name, value in bits.items() if "adaLN" in name} == {4}
    assert {value for name, value in bits.items() if "adaLN" not in name} == {2}


def test_bitnet_v2_rotates_only_outputs_of_attention_and_mlp() -> None:
    model = quantize_(dit(), load_plan("bitnetv2-a4"))
    rotated = {
        name for name, layer in quantized_layers(model).items() if layer.rotation is not None
    }
    assert rotated == {f"blocks.{i}.{kind}" for i in range(2) for kind in ("attn.proj", "mlp.fc2")}
    assert all(layer.branch is None for layer in quantized_layers(model).values())


def test_attention_products_are_quantized_when_the_plan_says_so() -> None:
    quantized = quantize_(dit(), load_plan("a4"))
    assert quantized.get_submodule("blocks.0.attn").matmul_quantizer is not None
    kept = quantize_(dit(), changed("a4", sections={"attention": {"matmul_bits": None}}))
    assert kept.get_submodule("blocks.0.attn").matmul_quantizer is None


def test_eight_bits_stay_close_and_fewer_bits_are_worse() -> None:
    model = dit()
    for block in model.blocks:
        nn.init.normal_(block.adaLN_modulation[1].weight, std=0.1)
    nn.init.normal_(model.final_layer.linear.weight, std=0.1)
    state = model.state_dict()
    reference = run(model)
    errors = []
    for bits in (8, 4, 2, 1):
        copy = dit()
        copy.load_state_dict(state)
        kept = rule("kept", kind="adaLN")
        quantize_(copy, changed("a4", "block", weight="none", activation=bits, first=[kept]))
        errors.append((run(copy) - reference).square().mean().item())
    assert errors[0] < 1e-3 * reference.square().mean().item()
    assert errors == sorted(errors)


def test_full_precision_changes_nothing() -> None:
    model = dit()
    before = run(model)
    assert quantize_(model, load_plan("fp")) is model
    assert quantized_layers(model) == {}
    assert torch.equal(run(model), before)


def test_filter_and_skip_patterns_keep_layers() -> None:
    kept = quantize_(dit(), load_plan("a4"), filter_fn=lambda module, name: "mlp" in name)
    assert all("mlp" in name for name in quantized_layers(kept))
    kept = rule("kept", match=["*qkv", "t_embedder*", "final_layer*"])
    skip = quantize_(dit(), changed("a4", first=[kept]))
    assert len(quantized_layers(skip)) == 8
    assert not any(name.endswith("qkv") for name in quantized_layers(skip))
    with pytest.raises(UsageError, match="matches no"):
        quantize_(dit(), load_plan("a4"), filter_fn=lambda module, name: False)


def test_twice_is_refused() -> None:
    model = quantize_(dit(), load_plan("a4"))
    with pytest.raises(UsageError, match="quantized already"):
        quantize_(model, load_plan("a4"))


def test_a_width_without_hadamard_matrix_names_the_layer_and_changes_nothing() -> None:
    model = dit(hidden_size=92)  # 92 is the smallest order the Paley constructions miss
    with pytest.raises(UnsupportedHadamardOrder, match=r"blocks\.0\.attn\.qkv.*92"):
        quantize_(model, load_plan("a4"))
    assert quantized_layers(model) == {}


def test_a_rank_that_does_not_fit_names_the_layer_and_changes_nothing() -> None:
    model = dit()
    with pytest.raises(ConfigError, match=r"attn\.qkv.*branch\.rank 49"):
        quantize_(model, changed("a4", rank=49))
    assert quantized_layers(model) == {}


def test_allocations_must_name_the_models_layers() -> None:
    names = allocatable_layers(quantize_(dit(), load_plan("a4")))
    bits = {name: 1 + i % 4 for i, name in enumerate(names)}
    model = quantize_(dit(), load_plan("a4"), bits_by_layer=bits)
    assert {n: quantized_layers(model)[n].activation_bits for n in names} == bits
    with pytest.raises(UsageError, match="lacks 1 layers: blocks"):
        quantize_(dit(), load_plan("a4"), bits_by_layer=dict(list(bits.items())[1:]))
    untouched = dit()
    with pytest.raises(UsageError, match=r"blocks\.9.*did you mean"):
        quantize_(untouched, load_plan("a4"), bits_by_layer={**bits, "blocks.9.attn.qkv": 2})
    assert quantized_layers(untouched) == {}


def test_set_activation_bits_is_all_or_nothing() -> None:
    model = quantize_(dit(), load_plan("a4"))
    with pytest.raises(ConfigError, match="9"):
        set_activation_bits(model, {"blocks.0.attn.qkv": 2, "blocks.0.attn.proj": 9})
    with pytest.raises(ConfigError, match="whole number"):
        set_activation_bits(model, {"blocks.0.attn.qkv": 2.5})  # type: ignore[dict-item]
    with pytest.raises(UsageError, match="load_plan"):
        quantize_(dit(), "a4")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="no quantized layer"):
        set_activation_bits(model, {"blocks.0.attn.qkv": 2, "nothing": 2})
    assert {layer.activation_bits for layer in quantized_layers(model).values()} == {4}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("blocks.3.attn.qkv", "qkv"),
        ("blocks.3.mlp.fc2", "fc2"),
        ("blocks.3.adaLN_modulation.1", "adaLN"),
        ("transformer_blocks.0.attn1.to_out.0", "to_out"),
        ("transformer_blocks.0.ff.net.0.proj", "fc1"),
        ("transformer_blocks.0.ff.net.2", "fc2"),
        ("transformer_blocks.0.norm1.linear", "adaLN"),
        ("joint_transformer_blocks.0.norm1_context.linear", "adaLN"),
        ("transformer_blocks.0.img_mod.1", "adaLN"),
        ("visual_transformer_blocks.0.visual_modulation.out_layer", "adaLN"),
        ("layers.0.adaln_modulation", "adaLN"),
        ("module.blocks.3.mlp.fc1", "fc1"),
        ("blocks.3._orig_mod.mlp.fc1", "fc1"),
        ("norm.blocks.3.attn.qkv", "qkv"),
        ("blocks.3.attn.qkv.base_layer", "qkv"),
        ("blocks.0.ff.net.0.proj.base_layer", "fc1"),
        ("linear", "linear"),
        ("", ""),
    ],
)
def test_layer_types(name: str, kind: str) -> None:
    assert layer_type(name) == kind


def test_diffusers_dit_is_quantized_like_any_module() -> None:
    import_torchvision()
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=24,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
        norm_num_groups=1,
    )
    inputs = {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([1, 500]),
        "class_labels": torch.tensor([0, 3]),
    }
    quantize_(model, load_plan("a4"))
    names = set(quantized_layers(model))
    for kind in (
        "attn1.to_q",
        "attn1.to_k",
        "attn1.to_v",
        "attn1.to_out.0",
        "ff.net.0.proj",
        "ff.net.2",
        "norm1.linear",
    ):
        assert f"transformer_blocks.1.{kind}" in names
    assert not any("emb" in name or name.startswith("proj_out") for name in names)
    allocatable = allocatable_layers(model)
    assert not any("norm1" in name for name in allocatable)
    model.train()
    model(**inputs).sample.square().mean().backward()
    gradients = [layer.master_weight.grad for layer in quantized_layers(model).values()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


def test_pixart_is_quantized_like_any_module() -> None:
    import_torchvision()
    from diffusers import PixArtTransformer2DModel

    model = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=24,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        cross_attention_dim=48,
        caption_channels=16,
        sample_size=8,
        norm_num_groups=1,
    )
    quantize_(model, load_plan("a2-uniform"))
    names = set(quantized_layers(model))
    assert {"transformer_blocks.0.attn2.to_q", "transformer_blocks.0.ff.net.2"} <= names
    assert not any(name.startswith(("adaln_single", "caption_projection")) for name in names)
