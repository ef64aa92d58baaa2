"""Capture on our DiT, on a diffusers transformer, and through shards."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from making import quantized
from torch import nn

from robuq_bench._compat import import_torchvision
from robuq_bench.checkpointing import save_tensors
from robuq_bench.errors import CheckpointError, UsageError
from robuq_bench.methods.activations._token_grid import token_grid
from robuq_bench.methods.centrings.mean import Centre
from robuq_bench.normality.capture import Captured, load_shard, record, save_shard


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Linear(6, 6)
        self.pooled = nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.pooled(self.tokens(x).mean(1))


def run(batches: list[list[int]], images: torch.Tensor, **options: int) -> Captured:
    with record(Toy(), ["tokens", "pooled"], options.get("per_image", 3), seed=5) as recorder:
        for index in batches:
            recorder.images = index
            recorder_model(recorder, images[index])
    return recorder.result()


def recorder_model(recorder: object, x: torch.Tensor) -> None:
    recorder.add("tokens", x)  # type: ignore[attr-defined]
    recorder.add("pooled", x.mean(1))  # type: ignore[attr-defined]


def test_the_sample_does_not_depend_on_batches_and_holds_real_tokens() -> None:
    images = torch.randn(8, 10, 6)
    one = run([list(range(8))], images)["tokens"]
    many = run([[3, 1], [0], [2, 4, 5, 6, 7]], images)["tokens"]
    assert one.tokens.shape == (24, 6)
    order = many.images.argsort(stable=True)
    torch.testing.assert_close(many.tokens[order], one.tokens, rtol=0, atol=0)
    assert one.images.tolist() == [i for i in range(8) for _ in range(3)]
    for token, image in zip(one.tokens, one.images, strict=True):
        assert (images[image] == token).all(1).sum() == 1


def test_no_position_is_drawn_twice_and_all_are_reached() -> None:
    # 300 images with tokens numbered 0 to 9: every position near 3/10 of the time.
    images = torch.arange(10.0).view(1, 10, 1).expand(300, 10, 6).contiguous()
    picked = run([list(range(300))], images)["tokens"].tokens[:, 0].view(300, 3)
    assert all(len(set(row.tolist())) == 3 for row in picked)
    counts = torch.bincount(picked.flatten().long(), minlength=10)
    assert (counts - 90).abs().max() < 4 * math.sqrt(300 * 0.3 * 0.7)


def test_hooks_see_what_the_layers_see_and_are_removed() -> None:
    model = Toy()
    x = torch.randn(4, 5, 6)
    with record(model, ["tokens", "pooled"], 100, seed=0) as recorder:
        recorder.images = [7, 8, 9, 11]
        model(x)
    model(torch.randn(4, 5, 6))
    captured = recorder.result()
    torch.testing.assert_close(captured["tokens"].tokens, x.flatten(0, 1), rtol=0, atol=0)
    assert captured["pooled"].tokens.shape == (4, 6)
    assert captured["pooled"].images.tolist() == [7, 8, 9, 11]


def test_tokens_of_a_centred_layer_are_what_its_quantizer_sees() -> None:
    linear = nn.Linear(6, 6)
    layer = quantized(linear, rotation="none", rank=0, activation=("robust-midrise", 4))
    centre = torch.arange(6.0)
    layer.centring = Centre(centre)
    x = torch.randn(4, 5, 6)
    with record(nn.Sequential(layer), ["0"], 100, seed=0) as recorder:
        recorder.images = range(4)
        output = nn.Sequential(layer)(x)
    tokens = recorder.result()["0"].tokens
    torch.testing.assert_close(tokens, (x - centre).flatten(0, 1), rtol=0, atol=0)
    rounded = token_grid("robust-midrise").fake_quantize(tokens, 4)
    product = nn.functional.linear(rounded, layer.quantized_weight(), layer.bias)
    torch.testing.assert_close(product, output.flatten(0, 1))


def test_wrong_layers_and_wrong_batches_are_named() -> None:
    model = Toy()
    with pytest.raises(UsageError, match="'pool' to observe; did you mean 'pooled'"):
        record(model, ["pool"], 1, seed=0).__enter__()
    with record(model, ["tokens"], 1, seed=0) as recorder:
        recorder.images = [0, 1]
        with pytest.raises(UsageError, match=r"'tokens': expected floats .2 images"):
            model(torch.randn(3, 5, 6))


def test_a_diffusers_transformer() -> None:
    import_torchvision()
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=3,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
    ).eval()
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    blocks = [name for name in layers if name.startswith("transformer_blocks.")]
    with record(model, blocks, 4, seed=0) as recorder, torch.no_grad():
        recorder.images = [0, 1, 2]
        model(torch.randn(3, 3, 8, 8), torch.tensor([1, 500, 900]), torch.tensor([0, 1, 2]))
    captured = recorder.result()
    assert set(captured) == set(blocks)
    assert captured["transformer_blocks.1.attn1.to_q"].tokens.shape == (12, 16)
    assert captured["transformer_blocks.1.ff.net.2"].tokens.shape == (12, 64)
    assert captured["transformer_blocks.0.norm1.linear"].images.tolist() == [0, 1, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shards_keep_tokens_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    captured = run([[0, 1, 2]], torch.randn(3, 10, 6).to(dtype))
    path = tmp_path / "t0500.safetensors"
    save_shard(path, captured, {"subject": "teacher", "timestep": "500"})
    loaded, metadata = load_shard(path)
    assert metadata["subject"] == "teacher"
    assert set(loaded) == set(captured)
    for layer, part in captured.items():
        assert loaded[layer].tokens.dtype == dtype
        assert torch.equal(loaded[layer].tokens, part.tokens)
        assert torch.equal(loaded[layer].images, part.images)


def test_damaged_and_foreign_shards_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_tensors(path, {"weight": torch.zeros(2)}, {"format": "something else"})
    with pytest.raises(CheckpointError, match="not a shard of activations"):
        load_shard(path)
    save_tensors(path, {"tokens/a": torch.zeros(2, 3)}, {"format": "robuq-bench activations 1"})
    with pytest.raises(CheckpointError, match="'a' needs tokens/a"):
        load_shard(path)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match=json.dumps(str(path))[1:-1]):
        load_shard(path)
