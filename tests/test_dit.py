"""The DiT against diffusers' DiTTransformer2DModel, published sizes and its own definition."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from robuq_bench.errors import UsageError
from robuq_bench.models.checkpoints import to_diffusers
from robuq_bench.models.dit import (
    SIZES,
    Attention,
    DiT,
    sincos_position_embedding,
    timestep_embedding,
)

TINY: dict[str, Any] = {
    "input_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "hidden_size": 48,
    "depth": 2,
    "num_heads": 4,
    "num_classes": 10,
}


def random_dit(seed: int = 0, **overrides: Any) -> DiT:
    """A DiT whose every weight is random: the zeros of a fresh one would hide mistakes."""
    model = DiT(**{**TINY, **overrides}).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "pos_embed":
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def random_inputs(model: DiT, batch: int, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, model.in_channels, model.input_size, model.input_size)
    return (
        torch.randn(shape, generator=generator),
        torch.randint(1000, (batch,), generator=generator),
        torch.randint(model.num_classes + 1, (batch,), generator=generator),
    )


def diffusers_twin(
    model: DiT, *, same_frequencies: bool = True, same_epsilon: bool = True
) -> nn.Module:
    """Return diffusers' model with the same weights, its two documented differences undone."""
    from robuq_bench._compat import import_torchvision

    import_torchvision()
    from diffusers.models.embeddings import Timesteps
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

    hidden_size = model.pos_embed.shape[-1]
    heads = model.blocks[0].attn.num_heads
    twin = DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=hidden_size // heads,
        in_channels=model.in_channels,
        out_channels=model.out_channels,
        num_layers=len(model.blocks),
        sample_size=model.input_size,
        patch_size=model.patch_size,
        num_embeds_ada_norm=model.num_classes,
        norm_eps=1e-6 if same_epsilon else 1e-5,
    )
    if same_frequencies:
        for module in twin.modules():
            if isinstance(module, Timesteps):
                module.downscale_freq_shift = 0
    twin.load_state_dict(to_diffusers(model.state_dict()), strict=True)
    return twin.eval()


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param({}, id="latents-learned-sigma"),
        pytest.param({"learn_sigma": False, "in_channels": 1, "num_heads": 3}, id="pixels"),
        pytest.param({"patch_size": 4, "input_size": 16, "depth": 3}, id="patch4-16x16"),
        pytest.param({"hidden_size": 144, "num_heads": 2, "input_size": 12}, id="width144"),
    ],
)
@torch.no_grad()
def test_output_equals_diffusers_after_conversion(overrides: dict[str, Any]) -> None:
    model = random_dit(**overrides)
    x, t, y = random_inputs(model, 5)
    ours = model(x, t, y)
    theirs = diffusers_twin(model)(x, t, y).sample
    assert ours.shape == theirs.shape == (5, model.out_channels, *x.shape[2:])
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("undone", ["same_frequencies", "same_epsilon"])
@torch.no_grad()
def test_documented_differences_from_diffusers_are_the_only_ones(undone: str) -> None:
    model = random_dit()
    x, t, y = random_inputs(model, 5)
    # Tokens of variance about 1e-6 where the second LayerNorm sees them make its epsilon visible.
    for module in (model.x_embedder, model.blocks[0].attn.proj):
        for parameter in module.parameters():
            parameter.mul_(1e-3)
    model.pos_embed.mul_(1e-3)
    twin, changed = diffusers_twin(model), diffusers_twin(model, **{undone: False})
    for other in (twin, changed):
        other.pos_embed.pos_embed.mul_(1e-3)
    ours = model(x, t, y)
    scale = ours.abs().max()
    assert (ours - twin(x, t, y).sample).abs().max() <= 1e-5 * scale
    assert (ours - changed(x, t, y).sample).abs().max() > 1e-4 * scale


@pytest.mark.parametrize(("hidden_size", "grid_size"), [(144, 4), (384, 16), (1152, 16), (64, 1)])
def test_position_table_equals_diffusers(hidden_size: int, grid_size: int) -> None:
    from diffusers.models.embeddings import get_2d_sincos_pos_embed

    theirs = get_2d_sincos_pos_embed(hidden_size, grid_size, base_size=grid_size, output_type="pt")
    ours = sincos_position_embedding(hidden_size, grid_size)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), theirs.double(), rtol=0, atol=1e-6)


def test_timestep_features_equal_diffusers_without_frequency_shift() -> None:
    from diffusers.models.embeddings import get_timestep_embedding

    t = torch.tensor([0, 1, 7, 500, 999])
    theirs = get_timestep_embedding(t, 256, flip_sin_to_cos=True, downscale_freq_shift=0)
    torch.testing.assert_close(timestep_embedding(t), theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("size", "millions"), [("S", 32.96), ("B", 130.5), ("L", 458.1), ("XL", 675.13)]
)
def test_parameter_counts_of_the_published_sizes(size: str, millions: float) -> None:
    """At patch 2, 256 px (32x32 latents), learned sigma; the position table (256 x h) counts."""
    with torch.device("meta"):
        model = DiT(**SIZES[size])
    count = sum(parameter.numel() for parameter in model.parameters())
    decimals = len(str(millions).split(".")[1])
    assert round(count / 1e6, decimals) == millions


def test_state_dict_has_the_released_names_and_shapes() -> None:
    with torch.device("meta"):
        model = DiT(**{**SIZES["XL"], "depth": 2})
    expected = {
        "pos_embed": (1, 256, 1152),
        "x_embedder.proj.weight": (1152, 4, 2, 2),
        "x_embedder.proj.bias": (1152,),
        "t_embedder.mlp.0.weight": (1152, 256),
        "t_embedder.mlp.0.bias": (1152,),
        "t_embedder.mlp.2.weight": (1152, 1152),
        "t_embedder.mlp.2.bias": (1152,),
        "y_embedder.embedding_table.weight": (1001, 1152),
        "final_layer.linear.weight": (32, 1152),
        "final_layer.linear.bias": (32,),
        "final_layer.adaLN_modulation.1.weight": (2304, 1152),
        "final_layer.adaLN_modulation.1.bias": (2304,),
    }
    shapes = {
        "attn.qkv": (3456, 1152),
        "attn.proj": (1152, 1152),
        "mlp.fc1": (4608, 1152),
        "mlp.fc2": (1152, 4608),
        "adaLN_modulation.1": (6912, 1152),
    }
    for index in range(2):
        for name, shape in shapes.items():
            expected[f"blocks.{index}.{name}.weight"] = shape
            expected[f"blocks.{index}.{name}.bias"] = shape[:1]
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == expected


def test_fresh_model_is_adaln_zero_with_the_published_initialisation() -> None:
    torch.manual_seed(0)
    model = DiT(**{**TINY, "hidden_size": 192})
    x, t, y = random_inputs(model, 3)
    assert torch.equal(model(x, t, y), torch.zeros(3, 8, 8, 8))
    tokens = torch.randn(3, 16, 192)
    assert torch.equal(model.blocks[0](tokens, torch.randn(3, 192)), tokens)

    xavier = {
        "x_embedder.proj.weight": 2 * 2 * 4 + 192,
        "blocks.1.attn.qkv.weight": 192 + 576,
        "blocks.0.mlp.fc2.weight": 768 + 192,
    }
    for name, fans in xavier.items():
        weight, bound = model.get_parameter(name), math.sqrt(6 / fans)
        assert weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    for name in ("t_embedder.mlp.0", "t_embedder.mlp.2", "y_embedder.embedding_table"):
        weight = model.get_parameter(f"{name}.weight")
        assert weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert not model.pos_embed.requires_grad


@pytest.mark.parametrize("in_channels", [1, 3, 4])
@settings(max_examples=10)
@given(cfg_scale=st.floats(0, 8))
@torch.no_grad()
def test_guidance_acts_on_the_first_three_channels_only(in_channels: int, cfg_scale: float) -> None:
    model = random_dit(in_channels=in_channels)
    x, t, _ = random_inputs(model, 2)
    y, null = torch.tensor([3, 7]), torch.tensor([10, 10])
    cond, uncond = model(x, t, y), model(x, t, null)
    # The second half of x is ignored, as in the released sampler.
    doubled = torch.cat([x, torch.full_like(x, 1e6)])
    output = model.forward_with_cfg(doubled, torch.cat([t, t]), torch.cat([y, null]), cfg_scale)
    guided = min(3, in_channels)
    expected = uncond[:, :guided] + cfg_scale * (cond[:, :guided] - uncond[:, :guided])
    tolerance = 1e-5 * (1 + cfg_scale) * cond.abs().max().item()
    for half, plain in zip(output.chunk(2), (cond, uncond), strict=True):
        torch.testing.assert_close(half[:, :guided], expected, rtol=0, atol=tolerance)
        torch.testing.assert_close(half[:, guided:], plain[:, guided:], rtol=0, atol=tolerance)


@torch.no_grad()
def test_rows_of_a_batch_do_not_see_each_other() -> None:
    model = random_dit()
    x, t, y = random_inputs(model, 6)
    together = model(x, t, y)
    alone = torch.cat([model(x[i : i + 1], t[i : i + 1], y[i : i + 1]) for i in range(6)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5 * float(together.abs().max()))


@torch.no_grad()
def test_every_input_matters() -> None:
    model = random_dit()
    x, t, y = random_inputs(model, 2)
    output = model(x, t, y)
    for changed in ((x + 0.1, t, y), (x, (t + 100) % 1000, y), (x, t, (y + 1) % 11)):
        assert (model(*changed) - output).abs().amax((1, 2, 3)).min() > 1e-3


def test_label_dropout_follows_the_given_uniforms() -> None:
    model = random_dit(class_dropout_prob=0.25)
    y = torch.tensor([1, 2, 3, 4])
    uniform = torch.tensor([0.0, 0.2499, 0.25, 0.99])
    assert model.drop_labels(y, uniform).tolist() == [10, 10, 3, 4]
    assert model.drop_labels(y, uniform).dtype == torch.int64
    assert y.tolist() == [1, 2, 3, 4]


def test_model_without_label_dropout_has_no_null_label() -> None:
    model = random_dit(class_dropout_prob=0.0)
    assert model.y_embedder.embedding_table.weight.shape[0] == 10
    y = torch.tensor([1, 2])
    assert torch.equal(model.drop_labels(y, torch.zeros(2)), y)
    with pytest.raises(UsageError, match="class_dropout_prob"):
        _ = model.null_label


def explicit_attention(
    attention: Attention, x: Tensor, quantize: Callable[[Tensor], Tensor]
) -> Tensor:
    """Attention head by head and image by image, quantizing every matmul operand by its rows."""
    width, heads = x.shape[2], attention.num_heads
    size = width // heads
    result = torch.empty_like(x)
    for image in range(len(x)):
        q, k, v = (attention.qkv.weight @ x[image].T + attention.qkv.bias[:, None]).split(width)
        for head in range(heads):
            rows = slice(head * size, (head + 1) * size)
            scores = quantize(q[rows].T) @ quantize(k[rows].T).T / math.sqrt(size)
            result[image, :, rows] = quantize(torch.softmax(scores, 1)) @ quantize(v[rows]).T
    return result @ attention.proj.weight.T + attention.proj.bias


def row_rounding(rows: Tensor) -> Tensor:
    """An 8-bit absmax quantizer per row, to see along which axis the rows run."""
    step = rows.abs().amax(-1, keepdim=True) / 127
    return (rows / step).round() * step


@torch.no_grad()
def test_attention_equals_its_definition_with_and_without_quantized_matmuls() -> None:
    torch.manual_seed(0)
    attention = Attention(48, 3)
    x = torch.randn(2, 16, 48)
    plain = attention(x)
    torch.testing.assert_close(plain, explicit_attention(attention, x, lambda rows: rows))
    attention.matmul_quantizer = lambda rows: rows
    torch.testing.assert_close(attention(x), plain)
    attention.matmul_quantizer = row_rounding
    torch.testing.assert_close(attention(x), explicit_attention(attention, x, row_rounding))
    assert not torch.allclose(attention(x), plain)


def test_from_config_takes_every_field() -> None:
    fields = {**TINY, "mlp_ratio": 2.0, "learn_sigma": False, "class_dropout_prob": 0.0}
    model = DiT.from_config(SimpleNamespace(**fields, kind="dit"))
    same = DiT(**fields)
    assert [(n, p.shape) for n, p in model.named_parameters()] == [
        (n, p.shape) for n, p in same.named_parameters()
    ]
    assert model.blocks[0].mlp.fc1.out_features == 96


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"input_size": 9}, "input_size 9"),
        ({"num_heads": 5}, "hidden_size 48"),
        ({"hidden_size": 50, "num_heads": 5}, "hidden_size"),
    ],
)
def test_impossible_shapes_are_named(overrides: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        DiT(**{**TINY, **overrides})
