"""Which layers of other people's models a plan quantizes: wrappers, ViTs, adapters, patterns."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from making import changed, like, of, rule
from torch import Tensor, nn

from robuq_bench._compat import import_torchvision
from robuq_bench.config import Plan, load_plan
from robuq_bench.errors import UsageError
from robuq_bench.models.dit import DiT, DiTBlock
from robuq_bench.quantization.convert import (
    allocatable_layers,
    layer_type,
    quantize_,
    quantized_layers,
)
from robuq_bench.quantization.linear import QuantizedLinear
from robuq_bench.quantization.selection import select_layers

A4 = load_plan("a4")


def skipping(*patterns: str, base: Plan = A4) -> Plan:
    return changed(base, first=[rule("skip", patterns)])


def including(*patterns: str, base: Plan = A4) -> Plan:
    """`base` with its rules for layers outside the blocks that match, and modulation among them."""
    return changed(base, first=[like(of(base, "block"), name="head", kind="other", match=patterns)])


def dit() -> DiT:
    torch.manual_seed(0)
    sizes = {"input_size": 4, "in_channels": 1, "hidden_size": 16, "depth": 2, "num_heads": 2}
    return DiT(**sizes, num_classes=3, learn_sigma=False)


def diffusers_dit() -> nn.Module:
    import_torchvision()
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "num_layers": 2}
    return DiTTransformer2DModel(**sizes, sample_size=8, num_embeds_ada_norm=10)


def kinds(model: nn.Module, own: Plan = A4) -> dict[str, str]:
    """By name what becomes of every layer: the rule that quantizes it, or "kept"."""
    return {
        name: "kept" if chosen.rule is None else chosen.rule.name
        for name, chosen in select_layers(model, own).items()
    }


def names(model: nn.Module, rule: str, own: Plan = A4) -> set[str]:
    return {name for name, its_rule in kinds(model, own).items() if its_rule == rule}


class Holder(nn.Module):
    """A wrapper with children of the given names; runs the first."""

    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, *args: Any) -> Any:
        return next(self.children())(*args)


def wrapped(model: nn.Module, prefix: list[str]) -> nn.Module:
    for name in reversed(prefix):
        model = nn.Sequential(model) if name == "0" else Holder(**{name: model})
    return model


MODELS = {"DiT": dit(), "a DiT of diffusers": diffusers_dit(), "a block": dit().blocks[0]}
WRAPPERS = (
    "module _orig_mod dit model transformer norm norm1 mod modulation adaLN embed embedder emb "
    "x_embedder t_embedder final_layer proj_out head attn attention adapter lora experts 0"
)


@given(
    st.sampled_from(sorted(MODELS)),
    st.lists(st.sampled_from(WRAPPERS.split()) | st.from_regex(r"[a-z_]{1,9}", fullmatch=True)),
)
def test_a_wrapper_changes_nothing_whatever_its_name(which: str, prefix: list[str]) -> None:
    assume(not any(hasattr(nn.Module(), name) for name in prefix))
    model = MODELS[which]
    start = ".".join([*prefix, ""])
    assert kinds(wrapped(model, prefix)) == {start + n: kind for n, kind in kinds(model).items()}


@pytest.mark.parametrize("prefix", [[], ["module"], ["_orig_mod"], ["0", "norm", "embed", "dit"]])
def test_the_ten_layers_of_two_blocks_are_converted_and_eight_allocated(prefix: list[str]) -> None:
    own = load_plan("a2-uniform")
    model = quantize_(wrapped(dit(), prefix), own)
    start = ".".join([*prefix, "blocks."])
    layers = quantized_layers(model)
    assert len(layers) == 10
    assert all(name.startswith(start) for name in layers)
    allocated = allocatable_layers(model)
    assert len(allocated) == 8
    bits = dict.fromkeys(allocated, 2)
    for name, layer in layers.items():
        assert layer.activation_bits == bits.get(name, 4)
    bits = dict.fromkeys(allocated, 3)
    quantize_(wrapped(dit(), prefix), own, bits_by_layer=bits)


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")  # torch's own
def test_the_wrappers_of_torch() -> None:
    for wrapper in (nn.DataParallel, torch.compile):
        assert len(quantized_layers(quantize_(wrapper(dit()), A4))) == 10


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
def test_blocks_compiled_one_by_one() -> None:
    model = dit()
    for i in range(2):
        model.blocks[i] = torch.compile(model.blocks[i])
    expected = {name.replace(".adaLN", "._orig_mod.adaLN") for name in names(dit(), "adaln")}
    assert names(model, "adaln") == expected
    assert len(names(model, "block")) == 8
    assert layer_type("blocks.0._orig_mod.attn.qkv") == "qkv"


def test_a_pipeline_of_two_transformers() -> None:
    pipeline = nn.ModuleDict({"transformer": dit(), "transformer_2": diffusers_dit()})
    expected = {f"transformer.{name}": kind for name, kind in kinds(dit()).items()}
    second = kinds(MODELS["a DiT of diffusers"]).items()
    assert kinds(pipeline) == expected | {f"transformer_2.{name}": kind for name, kind in second}
    embedders = nn.ModuleDict({"embed_a": dit(), "embed_b": dit()})
    assert len(names(embedders, "kept")) == 2 * len(names(dit(), "kept"))
    one_in_an_embedder = nn.ModuleDict({"text_embedder": dit(), "transformer": dit()})
    assert all(name.startswith("transformer.") for name in names(one_in_an_embedder, "block"))


def test_one_model_under_two_names_is_selected_once() -> None:
    model = dit()
    selected = select_layers(Holder(model=model, ema=model), A4)
    assert {s.kind for name, s in selected.items() if ".blocks." in name} == {"block", "adaLN"}
    assert {s.kind for name, s in selected.items() if ".blocks." not in name} == {"other"}
    assert selected["model.blocks.0.attn.qkv"].aliases == ("ema.blocks.0.attn.qkv",)


def test_a_block_alone() -> None:
    assert kinds(DiTBlock(16, 2, 4.0)) == {
        "attn.qkv": "block",
        "attn.proj": "block",
        "mlp.fc1": "block",
        "mlp.fc2": "block",
        "adaLN_modulation.1": "adaln",
    }


def test_a_model_that_is_a_linear_layer() -> None:
    assert kinds(nn.Linear(8, 8)) == {"": "block"}
    assert isinstance(quantize_(nn.Linear(8, 8), changed(A4, rank=2)), QuantizedLinear)


def test_an_mlp_less_its_embedder_and_head() -> None:
    mlp = Holder(
        embed=nn.Linear(8, 8),
        hidden=nn.Linear(8, 8),
        norm=nn.LayerNorm(8),
        proj_out=nn.Linear(8, 2),
    )
    selected = select_layers(mlp, A4)
    assert {name for name, s in selected.items() if s.rule is not None} == {"hidden"}
    assert {name for name, s in selected.items() if s.kind == "block"} == {"hidden"}
    assert "embedder" in selected["embed"].reason
    assert "head" in selected["proj_out"].reason


# --- Transformers written elsewhere, by their module trees ---------------------------------------


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(16, 32), nn.Linear(32, 16)


class Block(nn.Module):
    """As in timm: names as in our DiT, without modulation."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.attn, self.mlp = Attention(), Mlp()


class CrossAttentionBlock(Block):
    """A whole block, though its class is called like an attention."""


IN_BLOCK = {"attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"}


def in_blocks(*blocks: str) -> set[str]:
    return {f"{block}.{name}" for block in blocks for name in IN_BLOCK}


def test_a_vit_as_in_timm() -> None:
    vit = Holder(
        patch_embed=Holder(proj=nn.Conv2d(1, 16, 2)),
        blocks=nn.Sequential(Block(), Block()),
        norm=nn.LayerNorm(16),
        head=nn.Linear(16, 10),
    )
    assert names(vit, "block") == in_blocks("blocks.0", "blocks.1")
    assert names(vit, "kept") == {"head"}


def test_a_vit_as_in_vit_pytorch() -> None:
    """Nested lists: a member of `layers` is a list of an attention and a feed-forward network."""
    layers = nn.ModuleList()
    for _ in range(2):
        feed_forward = Holder(net=nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16), nn.GELU()))
        attention = Attention()
        attention.norm = nn.LayerNorm(16)
        layers.append(nn.ModuleList([attention, feed_forward]))
    vit = Holder(
        to_patch_embedding=nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 16)),
        transformer=Holder(layers=layers, norm=nn.LayerNorm(16)),
        mlp_head=nn.Linear(16, 10),
    )
    assert names(vit, "block") == {
        f"transformer.layers.{i}.{name}"
        for i in range(2)
        for name in ("0.qkv", "0.proj", "1.net.1")
    }
    assert names(vit, "kept") == {"to_patch_embedding.1", "mlp_head"}


def test_a_block_between_two_lists_and_blocks_between_an_embedder_and_a_head() -> None:
    u_vit = Holder(
        in_blocks=nn.ModuleList([Block()]),
        mid_block=Block(),
        out_blocks=nn.ModuleList([Block()]),
        decoder_pred=nn.Linear(16, 4),
    )
    assert names(u_vit, "block") == in_blocks("in_blocks.0", "mid_block", "out_blocks.0")
    chain = nn.Sequential(Holder(proj=nn.Linear(4, 16)), Block(), Block(), nn.Linear(16, 4))
    assert names(chain, "block") == in_blocks("1", "2")
    assert names(chain, "kept") == {"0.proj", "3"}


def test_blocks_called_attention_and_a_list_of_attentions_within_a_block() -> None:
    named = Holder(layers=nn.ModuleList([CrossAttentionBlock()]), head=nn.Linear(16, 4))
    assert names(named, "block") == in_blocks("layers.0")
    listed = Holder(attns=nn.ModuleList([Attention(), Attention()]), mlp=Mlp())
    model = Holder(layers=nn.ModuleList([listed]), head=nn.Linear(16, 4))
    assert names(model, "kept") == {"head"}
    assert len(names(model, "block")) == 6


def test_blocks_whose_attention_shows_only_in_its_norms_and_other_names_of_modulation() -> None:
    """The single-stream block of the published Flux, and the modulation of VAR and others."""
    single = Holder(
        linear1=nn.Linear(16, 112),
        linear2=nn.Linear(80, 16),
        norm=Holder(query_norm=nn.LayerNorm(8), key_norm=nn.LayerNorm(8)),
        modulation=Holder(lin=nn.Linear(16, 48)),
        ada_lin=nn.Sequential(nn.SiLU(), nn.Linear(16, 96)),
        adaln_modulation=nn.Linear(16, 64),
    )
    model = Holder(single_blocks=nn.ModuleList([single]), img_in=nn.Linear(4, 16))
    assert names(model, "block") == {"single_blocks.0.linear1", "single_blocks.0.linear2"}
    assert {name.removeprefix("single_blocks.0.") for name in names(model, "adaln")} == {
        "modulation.lin",
        "ada_lin.1",
        "adaln_modulation",
    }
    assert names(model, "kept") == {"img_in"}


def test_a_router_of_experts_is_kept() -> None:
    block = Block()
    block.mlp = Holder(gate=nn.Linear(16, 3), experts=nn.ModuleList([Mlp(), Mlp(), Mlp()]))
    model = Holder(blocks=nn.ModuleList([block]), head=nn.Linear(16, 4))
    assert "router" in select_layers(model, A4)["blocks.0.mlp.gate"].reason
    assert len(names(model, "block")) == 2 + 3 * 2


def encoder() -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_an_encoder_of_torch_never_takes_its_fast_path(padded: bool) -> None:
    """In eval mode without gradients it would read the weights past the layers' forward."""
    model = encoder().eval()
    x = torch.randn(2, 5, 16)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2]) if padded else None
    plain = model(x, src_key_padding_mask=mask)
    selected = select_layers(model, A4)
    for i in range(2):
        assert selected[f"layers.{i}.linear1"].kind == "block"
        assert selected[f"layers.{i}.linear2"].kind == "block"
        assert (
            "NonDynamicallyQuantizableLinear" in selected[f"layers.{i}.self_attn.out_proj"].reason
        )
    quantize_(model, A4)
    slow = model(x, src_key_padding_mask=mask)
    with torch.no_grad():
        fast = model(x, src_key_padding_mask=mask)
    kept = slice(None) if mask is None else ~mask
    assert (fast - slow)[kept].abs().max() < 1e-5
    assert (slow - plain).abs().max() > 0.01


def test_attention_of_torch_has_nothing_to_quantize_and_says_why() -> None:
    with pytest.raises(UsageError, match=r"'out_proj' is a NonDynamically.*subclass of nn\.Linear"):
        quantize_(nn.MultiheadAttention(16, 2), A4)


class LoraLinear(nn.Module):
    """A layer under an adapter, with the names of PEFT."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base_layer.in_features, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, base_layer.out_features, bias=False)})

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


def test_adapters_are_kept_and_what_they_adapt_is_quantized() -> None:
    model = dit()
    for block in model.blocks:
        block.attn.qkv = LoraLinear(block.attn.qkv)
        block.adaLN_modulation[1] = LoraLinear(block.adaLN_modulation[1])
    model = wrapped(model, ["base_model", "model"])
    everything = like(of(A4, "block"), kind=("block", "adaLN", "other"))
    own = changed(A4, first=[like(everything, name="everything")])  # not even then
    for its_plan in (A4, own):
        selected = select_layers(model, its_plan)
        adapters = {name for name in selected if "lora_" in name}
        assert len(adapters) == 8
        assert {selected[name].reason for name in adapters} == {"is part of an adapter"}
    start = "base_model.model.blocks.1"
    assert selected[f"{start}.attn.qkv.base_layer"].kind == "block"
    assert selected[f"{start}.adaLN_modulation.1.base_layer"].kind == "adaLN"
    assert len(quantized_layers(quantize_(model, A4))) == 10


# --- rules, filter_fn and what is said -----------------------------------------------------------


def test_the_first_rule_that_fits_decides() -> None:
    included = including("t_embedder.*", "final_layer.linear")
    added = names(dit(), "head", included)
    assert added == {"t_embedder.mlp.0", "t_embedder.mlp.2", "final_layer.linear"}
    assert names(dit(), "block", included) == names(dit(), "block")
    own = skipping("mlp.0", "blocks.1.*", base=included)
    assert names(dit(), "head", own) == added - {"t_embedder.mlp.0"}
    assert not any("blocks.1" in name for name in names(dit(), "block", own))
    reasons = {s.reason for n, s in select_layers(dit(), own).items() if "blocks.1" in n}
    assert reasons == {"is kept by rule 'skip'"}
    # The other way round the first one is asked for all that it fits.
    both = changed(own, first=[of(included, "head").model_copy(update={"name": "first"})])
    assert names(dit(), "first", both) == added
    for prefix in ([], ["norm", "embed"]):
        model = wrapped(dit(), prefix)
        found = {name.split(".", len(prefix))[-1] for name in names(model, "head", included)}
        assert found == added


def test_a_rule_decides_slots_and_fixed_bits_of_what_it_fits() -> None:
    special = like(of(A4, "adaln"), name="special", kind="block", match="attn.qkv", rank=2)
    own = changed(A4, first=[special])
    assert names(dit(), "special", own) == {f"blocks.{i}.attn.qkv" for i in range(2)}
    assert "blocks.0.adaLN_modulation.1" in names(dit(), "adaln", own)
    model = quantize_(dit(), own)
    assert not any("qkv" in name for name in allocatable_layers(model))
    assert len(allocatable_layers(model)) == 6
    ranks = {name: layer.branch.up.shape[1] for name, layer in quantized_layers(model).items()}
    assert {rank for name, rank in ranks.items() if "qkv" in name} == {2}
    # a4's own: rank 16 at width 1152, and at least 1
    assert {rank for name, rank in ranks.items() if "qkv" not in name} == {1}


def test_modulation_can_be_quantized_by_the_rule_of_blocks() -> None:
    both = like(of(A4, "block"), kind=["block", "adaLN"])
    own = A4.model_copy(update={"layers": (both,)})
    assert len(names(dit(), "block", own)) == 10
    assert len(allocatable_layers(quantize_(dit(), own))) == 10


def test_modulation_is_kept_when_no_rule_fits_it() -> None:
    own = A4.model_copy(update={"layers": (of(A4, "block"),)})
    selected = select_layers(dit(), own)
    assert len(names(dit(), "block", own)) == 8
    assert selected["blocks.0.adaLN_modulation.1"].kind == "adaLN"
    assert "is of kind adaLN, and no rule" in selected["blocks.0.adaLN_modulation.1"].reason
    model = quantize_(dit(), own)
    assert not any("adaLN" in name for name in quantized_layers(model))


def test_a_shared_layer_under_contradicting_rules_is_refused_by_name() -> None:
    model = dit()
    model.head = model.blocks[0].attn.proj
    with pytest.raises(
        UsageError,
        match=r"'blocks\.0\.attn\.proj' and 'head' are one layer.*"
        r"first quantized by rule 'block' and the second full precision \(it is outside the blocks",
    ):
        quantize_(model, A4)
    assert not quantized_layers(model)
    skipped = skipping("attn.proj", "head")
    assert "blocks.0.attn.proj" in names(model, "kept", skipped)
    both = like(of(A4, "block"), name="both", kind=["block", "other"], match=["attn.proj", "head"])
    included = quantize_(model, changed(A4, first=[both]))
    assert included.head is included.blocks[0].attn.proj
    assert isinstance(included.head, QuantizedLinear)
    model = dit()
    model.blocks[1].adaLN_modulation[1] = model.blocks[1].mlp.fc1
    with pytest.raises(UsageError, match=r"by rule 'block' and.*by rule 'adaln'"):
        select_layers(model, A4)


def test_the_log_says_what_is_quantized_and_what_is_kept_for_which_reason(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = dit()
    model.blocks[0].attn.qkv = LoraLinear(model.blocks[0].attn.qkv)
    own = skipping("blocks.1.mlp.*")
    with caplog.at_level(logging.INFO, logger="robuq_bench"):
        quantize_(model, own, filter_fn=lambda module, name: name != "blocks.1.attn.proj")
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == (
        "plan a4 on DiT: 5 block and 2 adaLN layers quantized; "
        "4 kept, t_embedder.mlp.0, t_embedder.mlp.2, final_layer.linear and 1 more: "
        "each is outside the blocks (blocks); "
        "2 kept, blocks.0.attn.qkv.lora_A.default, blocks.0.attn.qkv.lora_B.default: "
        "each is part of an adapter; "
        "1 kept, blocks.1.attn.proj: each is kept by filter_fn; "
        "2 kept, blocks.1.mlp.fc1, blocks.1.mlp.fc2: each is kept by rule 'skip'"
    )


def test_rules_that_fit_nothing_are_told(caplog: pytest.LogCaptureFixture) -> None:
    block = of(A4, "block")
    first = [
        rule("skip", ["block.0.*", "0"]),  # one pattern of two
        like(block, name="final", match="final", kind="other"),
        like(block, name="ada", match="ada"),
        like(block, name="either", match=["*nor*this", "1"]),  # of which model soever
        like(block, name="shadowed", match="1"),
    ]
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(3)))
    own = changed(A4, first=first)
    assert [rule.name for rule in own.layers][-2:] == ["adaln", "block"]
    quantize_(model, own)
    told = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert told == [
        "rule 'skip' of [[layers]]: 'block.0.*' matches no layer",
        "rule 'final' of [[layers]] (match final, kind other) fits no layer",
        "rule 'ada' of [[layers]] (match ada, kind block) fits no layer",
        "rule 'shadowed' of [[layers]] (match 1, kind block) fits no layer",
    ]
