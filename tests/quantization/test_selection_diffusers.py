"""Which layers of diffusers' transformers are quantized, against what each layer really sees.

The expectation is independent of any rule on names: every family is run on a batch of two, and
the rows that each linear layer gets per image are counted. Inside the blocks (their lists are
written here by hand) a layer with one row per image modulates, and any other is a block layer;
outside the blocks everything is kept. Families whose blocks hold more than that say so.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Mapping
from functools import cache
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from making import changed
from torch import Tensor, nn

from robuq_bench._compat import import_torchvision
from robuq_bench.config import load_plan
from robuq_bench.quantization.convert import allocatable_layers, quantize_
from robuq_bench.quantization.selection import Selected, select_layers

BATCH = 2
TEXT = 5  # tokens of a prompt, fewer than those of an image
TIME = torch.tensor([1, 500])


def noise(*shape: int) -> Tensor:
    return torch.randn(BATCH, *shape)


def ids(tokens: int, axes: int = 3) -> Tensor:
    return torch.zeros(tokens, axes)


TINY = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "num_refiner_layers": 1,
    "in_channels": 4,
    "out_channels": 4,
    "sample_size": 8,
    "hidden_size": 32,
    "dim": 32,
    "model_dim": 32,
    "cross_attention_dim": 32,
    "caption_projection_dim": 32,
    "ffn_dim": 64,
    "ff_dim": 64,
    "caption_channels": 24,
    "cap_feat_dim": 24,
    "context_in_dim": 24,
    "joint_attention_dim": 24,
    "in_text_dim": 24,
    "text_dim": 24,
    "text_embed_dim": 24,
    "pooled_projection_dim": 16,
    "time_embed_dim": 16,
    "axes_dims_rope": (4, 4, 8),
    "rope_axes_dim": (4, 4, 8),
    "rope_max_seq_len": 32,
    "max_sequence_length": TEXT,
}
"""What a constructor gets of it: the parameters that it has."""

INPUTS = {
    "hidden_states": noise(4, 8, 8),
    "timestep": TIME,
    "encoder_hidden_states": noise(TEXT, 24),
    "encoder_attention_mask": torch.ones(BATCH, TEXT, dtype=torch.bool),
    "pooled_projections": noise(16),
    "img_ids": ids(16),
    "txt_ids": ids(TEXT),
}
"""What `forward` gets of it, likewise."""

GUIDANCE = {"guidance": torch.ones(BATCH)}
VIDEO = {"hidden_states": noise(4, 3, 8, 8)}
TOKENS = {"hidden_states": noise(16, 4)}  # 4 x 4 of them, as patches


class Family(NamedTuple):
    """A transformer: the lists that are its blocks, and what it needs besides TINY and INPUTS.

    `kept` are layers in blocks that stay in full precision.
    """

    lists: str
    arguments: Mapping[str, Any] = MappingProxyType({})
    inputs: Mapping[str, Any] = MappingProxyType({})
    kept: str | None = None


BLOCKS = "transformer_blocks"
BOTH = "transformer_blocks single_transformer_blocks"

FAMILIES: dict[str, Family] = {
    "DiTTransformer2DModel": Family(
        BLOCKS,
        {"num_embeds_ada_norm": 10},
        {"class_labels": torch.tensor([0, 3])},
        kept="norm1.emb",
    ),
    "PixArtTransformer2DModel": Family(
        BLOCKS, inputs={"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
    ),
    "SD3Transformer2DModel": Family(
        BLOCKS,
        {"pos_embed_max_size": 8, "dual_attention_layers": (0,), "qk_norm": "rms_norm"},
    ),
    "FluxTransformer2DModel": Family(BOTH, {"guidance_embeds": True}, TOKENS | GUIDANCE),
    "Flux2Transformer2DModel": Family(
        BOTH,
        {"axes_dims_rope": (4, 4, 4, 4)},
        {**TOKENS, **GUIDANCE, "img_ids": ids(16, 4), "txt_ids": ids(TEXT, 4)},
    ),
    "ChromaTransformer2DModel": Family(
        BOTH,
        {
            "approximator_num_channels": 16,
            "approximator_hidden_dim": 32,
            "approximator_layers": 2,
        },
        TOKENS,
    ),
    "CogVideoXTransformer3DModel": Family(
        BLOCKS,
        {
            "sample_width": 8,
            "sample_height": 8,
            "sample_frames": 9,
            "max_text_seq_length": TEXT,
        },
        {"hidden_states": noise(3, 4, 8, 8)},
    ),
    "WanTransformer3DModel": Family(
        "blocks",
        {"image_dim": 12, "added_kv_proj_dim": 32},
        {
            **VIDEO,
            "encoder_hidden_states": noise(512, 24),  # what follows 512 tokens is an image's
            "encoder_hidden_states_image": noise(6, 12),
        },
    ),
    "WanVACETransformer3DModel": Family(
        "blocks vace_blocks",
        {"vace_layers": [0, 1], "vace_in_channels": 8},
        {**VIDEO, "control_hidden_states": noise(8, 3, 8, 8)},
    ),
    "SkyReelsV2Transformer3DModel": Family("blocks", inputs=VIDEO),
    "QwenImageTransformer2DModel": Family(
        BLOCKS,
        inputs={
            **TOKENS,
            "encoder_hidden_states_mask": torch.ones(BATCH, TEXT, dtype=torch.long),
            "img_shapes": [[(1, 4, 4)]] * BATCH,
        },
    ),
    "HunyuanDiT2DModel": Family(
        "blocks",
        {
            "patch_size": 2,
            "num_layers": 4,
            "cross_attention_dim_t5": 24,
            "text_len": TEXT,
            "text_len_t5": TEXT,
        },
        {
            "timestep": TIME.float(),
            "encoder_hidden_states": noise(TEXT, 32),
            "text_embedding_mask": torch.ones(BATCH, TEXT),
            "encoder_hidden_states_t5": noise(TEXT, 24),
            "text_embedding_mask_t5": torch.ones(BATCH, TEXT),
            "image_meta_size": noise(6),
            "style": torch.tensor([0, 0]),
            "image_rotary_emb": (torch.ones(16, 16), torch.zeros(16, 16)),
        },
    ),
    "MochiTransformer3DModel": Family(BLOCKS, inputs=VIDEO),
    "AuraFlowTransformer2DModel": Family(
        "joint_transformer_blocks single_transformer_blocks",
        {"num_mmdit_layers": 1, "num_single_dit_layers": 2, "pos_embed_max_size": 16},
        {"timestep": TIME / 1000},
    ),
    "ZImageTransformer2DModel": Family(
        "noise_refiner context_refiner layers",
        {
            "n_layers": 2,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "n_kv_heads": 2,
            "axes_dims": [4, 4, 8],
            "axes_lens": [64, 64, 64],
        },
        {"x": list(noise(4, 1, 8, 8)), "t": TIME / 1000, "cap_feats": list(noise(TEXT, 24))},
    ),
    "Lumina2Transformer2DModel": Family(
        "noise_refiner context_refiner layers",
        {
            "num_kv_heads": 1,
            "multiple_of": 16,
            "axes_dim_rope": (4, 4, 8),
            "axes_lens": (64, 64, 64),
        },
    ),
    "SanaTransformer2DModel": Family(
        BLOCKS, {"num_cross_attention_heads": 2, "cross_attention_head_dim": 16}
    ),
    "LTXVideoTransformer3DModel": Family(
        BLOCKS, inputs={**TOKENS, "num_frames": 1, "height": 4, "width": 4}
    ),
    "HunyuanVideoTransformer3DModel": Family(BOTH, {}, VIDEO | GUIDANCE),
    "CogView4Transformer2DModel": Family(
        BLOCKS,
        {"condition_dim": 8, "rope_axes_dim": (8, 8)},
        {"original_size": noise(2), "target_size": noise(2), "crop_coords": noise(2)},
    ),
    "HiDreamImageTransformer2DModel": Family(
        "double_stream_blocks single_stream_blocks",
        {
            "patch_size": 2,
            "caption_channels": [24, 24],  # of T5 and of Llama
            "text_emb_dim": 16,
            "num_routed_experts": 2,
            "num_activated_experts": 2,
            "axes_dims_rope": (8, 4, 4),
            "max_resolution": (8, 8),
            "llama_layers": [0] * 4,
        },
        {
            "timesteps": TIME,
            "encoder_hidden_states_t5": noise(TEXT, 24),
            "encoder_hidden_states_llama3": torch.randn(1, BATCH, TEXT, 24),
            "pooled_embeds": noise(16),
        },
    ),
    "CosmosTransformer3DModel": Family(
        BLOCKS,
        {
            "adaln_lora_dim": 8,
            "max_size": (4, 16, 16),
            "extra_pos_embed_type": None,
            "concat_padding_mask": False,
        },
        VIDEO,
    ),
    "Kandinsky5Transformer3DModel": Family(
        "text_transformer_blocks visual_transformer_blocks",
        {
            "in_text_dim2": 16,
            "time_dim": 16,
            "num_text_blocks": 1,
            "num_visual_blocks": 2,
            "axes_dims": (4, 4, 8),
        },
        {
            "hidden_states": noise(3, 8, 8, 4),
            "visual_rope_pos": (torch.arange(3), torch.arange(4), torch.arange(4)),
            "text_rope_pos": torch.arange(TEXT),
        },
    ),
    "AllegroTransformer3DModel": Family(
        BLOCKS,
        {"sample_height": 8, "sample_width": 8, "sample_frames": 3},
        {**VIDEO, "encoder_hidden_states": noise(1, TEXT, 24), "encoder_attention_mask": None},
    ),
    "LatteTransformer3DModel": Family(
        "transformer_blocks temporal_transformer_blocks",
        {"patch_size": 2, "norm_type": "ada_norm_single", "video_length": 3},
        {**VIDEO, "encoder_attention_mask": None},
    ),
    "PRXTransformer2DModel": Family("blocks", {"num_heads": 2, "depth": 2, "axes_dim": [8, 8]}),
    "OmniGenTransformer2DModel": Family(
        "layers",
        {
            "num_key_value_heads": 2,
            "intermediate_size": 64,
            "pad_token_id": 0,
            "vocab_size": 10,
            "rope_scaling": {"long_factor": [1.0] * 8, "short_factor": [1.0] * 8},
            "pos_embed_max_size": 8,
        },
        {
            "input_ids": torch.ones(BATCH, TEXT, dtype=torch.long),
            "input_img_latents": [],
            "input_image_sizes": {},
            "attention_mask": torch.ones(BATCH, TEXT + 17, TEXT + 17),
            "position_ids": torch.arange(TEXT + 17).expand(BATCH, -1),
        },
    ),
    "NucleusMoEImageTransformer2DModel": Family(
        BLOCKS,
        {
            "num_layers": 5,  # the first three and the last are without experts
            "mlp_ratio": 8.0,
            "num_experts": 3,
            "moe_intermediate_dim": 16,
            "capacity_factors": 1.0,
        },
        {**TOKENS, "img_shapes": [(1, 4, 4)] * BATCH},
        kept="img_mlp.gate",  # the router
    ),
    "Ideogram4Transformer2DModel": Family(
        "layers",
        {
            "intermediate_size": 64,
            "adaln_dim": 16,
            "llm_features_dim": 24,
            "mrope_section": (4, 2, 2),
        },
        {
            **TOKENS,
            "timestep": TIME / 1000,
            "encoder_hidden_states": noise(16, 24),
            "position_ids": torch.zeros(BATCH, 16, 3, dtype=torch.long),
            "segment_ids": torch.zeros(BATCH, 16, dtype=torch.long),
            "indicator": torch.full((BATCH, 16), 2),
        },
    ),
    "BriaTransformer2DModel": Family(BOTH, {}, TOKENS),
    "LongCatImageTransformer2DModel": Family(BOTH, {}, TOKENS),
    "OvisImageTransformer2DModel": Family(BOTH, {}, TOKENS),
}


def of_signature(function: Callable[..., Any], values: dict[str, Any]) -> dict[str, Any]:
    return {key: values[key] for key in inspect.signature(function).parameters if key in values}


@cache
def build(name: str) -> nn.Module:
    import_torchvision()
    import diffusers

    torch.manual_seed(0)
    kind = getattr(diffusers, name)
    values = {**of_signature(kind.__init__, TINY), **FAMILIES[name].arguments}
    model: nn.Module = kind(**values)
    for parameter in model.parameters():  # some are left as memory was, or zero
        nn.init.normal_(parameter, std=0.1)
    return model.eval()


def rows_per_image(name: str, **inputs: Any) -> dict[str, float]:
    """Rows that each linear layer gets in one pass, divided by the images of the batch."""
    model = build(name)
    seen: dict[str, float] = {}

    def count(layer: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[layer] = seen.get(layer, 0) + args[0].shape[:-1].numel() / BATCH

        return hook

    handles = [
        module.register_forward_pre_hook(count(layer))
        for layer, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    with torch.no_grad():
        model(**{**of_signature(model.forward, INPUTS), **FAMILIES[name].inputs, **inputs})
    for handle in handles:
        handle.remove()
    return seen


def outcome(chosen: Selected) -> str:
    """Where a layer stands if it is quantized, by the rule for such layers; else "kept"."""
    if chosen.rule is None:
        assert chosen.reason
        return "kept"
    assert chosen.rule.kind == (chosen.kind,)
    return chosen.kind


@pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning")  # Mochi's, in float32
@pytest.mark.parametrize("name", FAMILIES)
def test_what_sees_tokens_in_a_block_is_quantized_as_such_and_no_other(name: str) -> None:
    family = FAMILIES[name]
    selected = select_layers(build(name), load_plan("a4"))
    rows = rows_per_image(name)
    expected = {}
    for layer in rows:
        in_block = layer.split(".")[0] in family.lists.split()
        if not in_block or (family.kept is not None and family.kept in layer):
            expected[layer] = "kept"
        else:
            expected[layer] = "adaLN" if rows[layer] == 1 else "block"
    assert {layer: outcome(selected[layer]) for layer in rows} == expected
    assert all(outcome(chosen) == "kept" for layer, chosen in selected.items() if layer not in rows)
    assert min(rows[layer] for layer in rows if expected[layer] == "block") >= TEXT
    assert family.kept is None or any(family.kept in layer for layer in rows)


@pytest.mark.parametrize(
    ("name", "timestep", "rows"),
    [
        ("CosmosTransformer3DModel", torch.rand(BATCH, 1, 3, 1, 1), 3 * 4 * 4),
        ("Ideogram4Transformer2DModel", torch.rand(BATCH, 16), 16),
    ],
)
def test_modulation_by_frame_or_token_is_modulation(name: str, timestep: Tensor, rows: int) -> None:
    """With a time for each frame or token, modulation sees as many rows as the block layers."""
    seen = rows_per_image(name, timestep=timestep)
    selected = select_layers(build(name), load_plan("a4"))
    modulation = [layer for layer, chosen in selected.items() if outcome(chosen) == "adaLN"]
    assert modulation
    assert {seen[layer] for layer in modulation} == {rows}


OTHERS = """
    AceStepTransformer1DModel AnyFlowFARTransformer3DModel AnyFlowTransformer3DModel
    BriaFibo2Transformer2DModel BriaFiboTransformer2DModel ChronoEditTransformer3DModel
    CogView3PlusTransformer2DModel ConsisIDTransformer3DModel ErnieImageTransformer2DModel
    Flux3Transformer2DModel GlmImageTransformer2DModel HeliosTransformer3DModel
    HunyuanVideo15Transformer3DModel HunyuanVideoFramepackTransformer3DModel
    JoyImageEditTransformer3DModel Krea2Transformer2DModel LTX2VideoTransformer3DModel
    MiniMaxH3Transformer3DModel MiniMaxMusic3Transformer1DModel MotifVideoTransformer3DModel
    QwenImage21Transformer2DModel SanaVideoTransformer3DModel SanaWMTransformer3DModel
    StableAudioDiTModel UNet2DConditionModel UNetSpatioTemporalConditionModel UVit2DModel
"""
IN_BLOCK = re.compile(
    r"^blocks\.\d+\.|(^|[._])(transformer_blocks|layers|attention_blocks|double_blocks|mode_blocks"
    r"|mode_blocks\.image|mode_blocks\.image_cond|layerwise_blocks|refiner_blocks|noise_refiner)"
    r"\.\d+\."
)
MODULATES = re.compile(r"\.(norm\d?(_context)?\.linear|adaLN_modulation\.0|adaln_proj\.linear)$")


@pytest.mark.parametrize("name", OTHERS.split())
def test_families_that_are_not_run_by_the_names_of_their_lists(name: str) -> None:
    import_torchvision()
    import diffusers

    kind = getattr(diffusers, name)
    with torch.device("meta"):
        values = {} if name.startswith("UNet") else of_signature(kind.__init__, TINY)
        model = kind(**values)
    for layer, chosen in select_layers(model, load_plan("a4")).items():
        if not IN_BLOCK.search(layer) or layer.startswith("context_embedder"):
            assert outcome(chosen) == "kept", layer
        else:
            assert outcome(chosen) == ("adaLN" if MODULATES.search(layer) else "block"), layer


@pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning")
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_runs_quantized(name: str) -> None:
    """Nothing in it reads a quantized weight past its layer."""
    plan = changed("a4", rotation="none")  # widths of 85
    model = quantize_(copy.deepcopy(build(name)), plan)
    selected = select_layers(build(name), plan)
    block = [layer for layer, chosen in selected.items() if outcome(chosen) == "block"]
    assert allocatable_layers(model) == block
    with torch.no_grad():
        output = model(**{**of_signature(model.forward, INPUTS), **FAMILIES[name].inputs})[0]
    assert all(bool(image.isfinite().all()) for image in output)
