"""The blocks of a DiT as four pairs of fused operations each.

    codes = LayerNorm, modulate, rotate, quantize (x)     y = qkv product, bias
    codes = rotate, quantize (attention(y))               x = x + gate * (proj product)
    codes = LayerNorm, modulate, rotate, quantize (x)     y = GELU(fc1 product)
    codes = rotate, quantize (y)                          x = x + gate * (fc2 product)

Attention with quantized operands multiplies their integers. The modulation of every block depends
on timestep and label alone, so it is computed for all blocks at once, before the first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kernels.hadamard_quantize.reference import Modulation, Quantized
from robuq_bench.inference.packed_linear import PackedLinear, kernel_module, product_operands
from robuq_bench.models.dit import Attention, Blocks
from robuq_bench.quantization.attention import integer_limit
from robuq_bench.quantization.grids import grid_of, kernel_rotation


class FusedBlocks(nn.Module):
    """`Blocks` whose linears are `PackedLinear`s on "integer", "cpu" or "triton"."""

    def __init__(self, blocks: Blocks) -> None:
        super().__init__()
        self.blocks = blocks
        members: Any = blocks  # nn.ModuleList does not say what it holds
        layers = [block.adaLN_modulation[1] for block in members]
        self.modulations: GroupedModulation | None = None
        if GroupedModulation.applies(layers):
            self.modulations = GroupedModulation(layers)
            for block in members:  # its memory is in `modulations` now
                block.adaLN_modulation = None

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        members: Any = self.blocks
        if self.modulations is None:
            modulations = torch.stack([block.adaLN_modulation(c) for block in members])
        else:
            modulations = self.modulations(c)
        # [L, 6, B, C] in one copy, so that every shift, scale and gate is contiguous.
        modulations = modulations.view(-1, batch, 6, width).transpose(1, 2).contiguous()
        x = x.reshape(batch * tokens, width).contiguous()  # a batch of 1 may be a strided view
        for block, modulation in zip(members, modulations.unbind(0), strict=True):
            x = _block(block, x, modulation, tokens)
        return x.view(batch, tokens, width)


def _block(block: Any, x: Tensor, modulation: Tensor, tokens: int) -> Tensor:
    """One `DiTBlock` on rows x [B T, C] with its modulation [6, B, C]."""
    shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation.unbind(0)
    qkv, proj, fc1, fc2 = block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2
    epilogue = {"out_dtype": x.dtype, "tokens_per_image": tokens}
    codes = qkv.quantize(x, modulation=Modulation(shift_attn, scale_attn, tokens, block.norm1.eps))
    y = qkv.product(codes, out_dtype=x.dtype).view(-1, tokens, qkv.out_features)
    codes = proj.quantize(attend(block.attn, y).view(len(x), -1))
    x = proj.product(codes, gate=gate_attn, residual=x, **epilogue)
    codes = fc1.quantize(x, modulation=Modulation(shift_mlp, scale_mlp, tokens, block.norm2.eps))
    y = fc1.product(codes, gelu=True, out_dtype=x.dtype)
    return fc2.product(fc2.quantize(y), gate=gate_mlp, residual=x, **epilogue)


def attend(attention: Any, qkv: Tensor) -> Tensor:
    """`Attention.attend`, with products of integers where they are quantized: [B, T, 3 C].

    An `attend` of the caller's own, in a subclass or on the module, is called as it is.
    """
    limit = integer_limit(attention.matmul_quantizer)
    own = type(attention).attend is not Attention.attend or "attend" in vars(attention)
    if limit is None or own:
        result: Tensor = attention.attend(qkv)
        return result
    module = kernel_module("quantized_attention", attention.qkv.arithmetic)
    heads = attention.num_heads
    result = module.quantized_attention(qkv, heads=heads, limit=limit, out_dtype=qkv.dtype)
    return result


class GroupedModulation(nn.Module):
    """SiLU and the adaLN linears of all blocks in two operations: c [B, C] -> [L, B, 6 C].

    Buffers are those of the layers stacked, [L, ...].
    """

    planes: Tensor
    unpacked: Tensor | None
    scale: Tensor
    weight_sums: Tensor
    bias: Tensor | None
    low_rank_up: Tensor | None
    low_rank_down: Tensor | None
    signs: Tensor

    BUFFERS = (
        "planes", "unpacked", "scale", "weight_sums", "bias", "low_rank_up", "low_rank_down",
    )  # fmt: skip

    def __init__(self, layers: list[PackedLinear]) -> None:
        super().__init__()
        first = layers[0]
        self.in_features, self.rotated = first.in_features, first.rotated
        self.arithmetic = first.arithmetic
        self.grid = grid_of(first.activation_method, first.activation_bits or 0)
        for name in self.BUFFERS:
            values = [getattr(layer, name) for layer in layers]
            self.register_buffer(name, None if values[0] is None else torch.stack(values))
        unsigned = first.scale.new_ones(self.in_features)
        signs = [unsigned if layer.signs is None else layer.signs for layer in layers]
        self.register_buffer("signs", torch.stack(signs))

    @staticmethod
    def applies(layers: list[Any]) -> bool:
        """Whether all layers are packed and alike; a centre of its own gives each other inputs."""
        if not all(isinstance(layer, PackedLinear) and layer.centring is None for layer in layers):
            return False
        alike = {
            (
                layer.activation_method,
                layer.activation_bits,
                layer.rotated,
                layer.rank,
                layer.signs is None,
                layer.bias is None,
                tuple(layer.planes.shape),
            )
            for layer in layers
        }
        return len(alike) == 1

    def forward(self, c: Tensor) -> Tensor:
        rotation = kernel_rotation(self.in_features, c.device) if self.rotated else None
        module = kernel_module("hadamard_quantize", self.arithmetic)
        tokens: Quantized = module.hadamard_quantize(
            c,
            self.grid,
            rotation=rotation,
            signs=self.signs,
            silu=True,
            down=self.low_rank_down,
        )
        module = kernel_module("ternary_matmul", self.arithmetic)
        operands = product_operands(tokens, self)
        result: Tensor = module.grouped_ternary_matmul(**operands, out_dtype=c.dtype)
        return result
