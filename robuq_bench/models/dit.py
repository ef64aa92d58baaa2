"""Diffusion Transformer (DiT) with facebookresearch/DiT's state-dict keys and numerics.

Source: Peebles & Xie, "Scalable Diffusion Models with Transformers" (ICCV 2023), and the
key names of its released checkpoints; written from the published description.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from robuq_bench.errors import UsageError

FREQUENCY_EMBEDDING_SIZE = 256
# The released sampler guides the first three channels of epsilon whatever the channel count.
CFG_GUIDED_CHANNELS = 3

CONFIG_FIELDS = (
    "input_size",
    "patch_size",
    "in_channels",
    "hidden_size",
    "depth",
    "num_heads",
    "mlp_ratio",
    "num_classes",
    "learn_sigma",
    "class_dropout_prob",
)

#: depth, hidden size, attention heads of the four sizes in the DiT paper (Table 1).
SIZES: dict[str, dict[str, int]] = {
    "S": {"depth": 12, "hidden_size": 384, "num_heads": 6},
    "B": {"depth": 12, "hidden_size": 768, "num_heads": 12},
    "L": {"depth": 24, "hidden_size": 1024, "num_heads": 16},
    "XL": {"depth": 28, "hidden_size": 1152, "num_heads": 16},
}


def sincos_position_embedding(hidden_size: int, grid_size: int) -> Tensor:
    """Return the fixed 2-D sin-cos table [grid_size**2, hidden_size], float32.

    The first half of the channels encodes the column, the second half the row, each as
    [sin, cos] of position / 10000^(k / (hidden_size / 4)).
    """
    if hidden_size % 4:
        raise UsageError(f"model.hidden_size must be divisible by 4, got {hidden_size}")
    if torch.get_default_device().type == "meta":  # `arange` there imports torch's compiler
        return torch.empty(grid_size**2, hidden_size)
    frequencies = 10000.0 ** (
        -torch.arange(hidden_size // 4, dtype=torch.float64) / (hidden_size / 4)
    )
    positions = torch.arange(grid_size, dtype=torch.float64)
    angles = positions[:, None] * frequencies
    one_axis = torch.cat([angles.sin(), angles.cos()], dim=1)
    columns = one_axis.repeat(grid_size, 1)
    rows = one_axis.repeat_interleave(grid_size, dim=0)
    return torch.cat([columns, rows], dim=1).float()


def timestep_embedding(t: Tensor, size: int = FREQUENCY_EMBEDDING_SIZE) -> Tensor:
    """Return [cos, sin] features [B, size] of integer timesteps t [B], float32."""
    half = size // 2
    exponents = torch.arange(half, dtype=torch.float32, device=t.device) / half
    angles = t.float()[:, None] * torch.exp(-math.log(10000.0) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Apply adaLN modulation: x [B, T, C], shift and scale [B, C]."""
    return x * (1 + scale[:, None]) + shift[:, None]


class PatchEmbed(nn.Module):
    """Non-overlapping patches to tokens: [B, C, H, W] -> [B, (H/p)(W/p), hidden_size]."""

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """Sinusoidal features of t followed by a two-layer SiLU MLP: [B] -> [B, hidden_size]."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(FREQUENCY_EMBEDDING_SIZE, hidden_size),
            nn.SiLU(),
            nn.Linear(hidden_size, hidden_size),
        )

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(timestep_embedding(t).to(next(self.parameters()).dtype))


class LabelEmbedder(nn.Module):
    """Class embedding; index `num_classes` is the null label of classifier-free guidance."""

    def __init__(self, num_classes: int, hidden_size: int, dropout_prob: float) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + int(dropout_prob > 0), hidden_size)
        self.num_classes = num_classes

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


class Attention(nn.Module):
    """Multi-head self-attention over tokens [B, T, C].

    `matmul_quantizer`, when set, fake-quantizes q, k, v and the attention probabilities per
    row (RobuQ keeps these two activation-activation products at 8 bits); None uses SDPA.
    """

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        if hidden_size % num_heads:
            raise UsageError(
                f"model.hidden_size {hidden_size} is not divisible by model.num_heads {num_heads}"
            )
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)
        self.matmul_quantizer: Callable[[Tensor], Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.attend(self.qkv(x)))

    def attend(self, qkv: Tensor) -> Tensor:
        """Attention between the two linear layers: [B, T, 3 C] -> [B, T, C]."""
        batch, tokens, channels = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
        heads = qkv.reshape(batch, tokens, 3, self.num_heads, channels // self.num_heads)
        q, k, v = heads.permute(2, 0, 3, 1, 4).unbind(0)
        if self.matmul_quantizer is None:
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            quantize = self.matmul_quantizer
            scores = quantize(q) @ quantize(k).transpose(-2, -1) * q.shape[-1] ** -0.5
            # v is reduced over tokens, so its quantization rows run along the token axis.
            out = quantize(scores.softmax(dim=-1)) @ quantize(v.transpose(-2, -1)).transpose(-2, -1)
        return out.transpose(1, 2).reshape(batch, tokens, channels)


class Mlp(nn.Module):
    """fc1, tanh-GELU, fc2 on [B, T, C]."""

    def __init__(self, hidden_size: int, mlp_hidden_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, mlp_hidden_size)
        self.fc2 = nn.Linear(mlp_hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class DiTBlock(nn.Module):
    """Transformer block with adaLN-Zero conditioning: x [B, T, C], c [B, C]."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        modulation = self.adaLN_modulation(c).chunk(6, dim=1)
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation
        x = x + gate_attn[:, None] * self.attn(modulate(self.norm1(x), shift_attn, scale_attn))
        return x + gate_mlp[:, None] * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class Blocks(nn.ModuleList):
    """The blocks of a DiT one after the other: x [B, T, C], c [B, C] -> [B, T, C]."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        for block in self:
            x = block(x, c)
        return x


class FinalLayer(nn.Module):
    """Modulated LayerNorm and the projection of each token to its output patch."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class _NoInitialisation(TorchFunctionMode):
    """Functions of `torch.nn.init` do nothing: `normal_` on "meta" imports torch's compiler."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        given = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return given["tensor"]
        return func(*args, **given)


class DiT(nn.Module):
    """Class-conditional Diffusion Transformer predicting epsilon (and optionally sigma).

    forward(x [B, C, H, W] float, t [B] int, y [B] int) -> [B, C or 2C, H, W]; with
    `learn_sigma` the last C channels parameterise the variance (LEARNED_RANGE).
    """

    def __init__(
        self,
        *,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        learn_sigma: bool = True,
        class_dropout_prob: float = 0.1,
    ) -> None:
        super().__init__()
        if input_size % patch_size:
            raise UsageError(
                f"model.input_size {input_size} is not divisible by model.patch_size {patch_size}"
            )
        self.input_size = input_size
        self.patch_size = patch_size
        self.in_channels = in_channels
        self.out_channels = in_channels * (2 if learn_sigma else 1)
        self.learn_sigma = learn_sigma
        self.num_classes = num_classes
        self.class_dropout_prob = class_dropout_prob

        grid_size = input_size // patch_size
        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        self.pos_embed = nn.Parameter(
            sincos_position_embedding(hidden_size, grid_size)[None], requires_grad=False
        )
        self.blocks = Blocks(DiTBlock(hidden_size, num_heads, mlp_ratio) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels)
        self._initialize()

    @classmethod
    def from_config(cls, model_config: Any) -> DiT:
        """Build from a workload's `model` section (any object with the constructor's fields)."""
        return cls(**{field: getattr(model_config, field) for field in CONFIG_FIELDS})

    @classmethod
    def without_values(cls, model_config: Any) -> DiT:
        """As `from_config`, on the meta device: names and shapes, nothing drawn or computed."""
        with torch.device("meta"), _NoInitialisation():
            return cls.from_config(model_config)

    @property
    def null_label(self) -> int:
        """The label of the unconditional branch; UsageError if trained without label dropout."""
        if self.class_dropout_prob <= 0:
            raise UsageError("guidance needs a model with class_dropout_prob > 0")
        return self.num_classes

    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.view(self.pos_embed.shape[-1], -1))
        nn.init.zeros_(self.get_parameter("x_embedder.proj.bias"))
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        nn.init.normal_(self.get_parameter("t_embedder.mlp.0.weight"), std=0.02)
        nn.init.normal_(self.get_parameter("t_embedder.mlp.2.weight"), std=0.02)
        # adaLN-Zero: every block starts as the identity, the output as zero.
        for name, parameter in self.named_parameters():
            if "adaLN_modulation" in name or name.startswith("final_layer.linear"):
                nn.init.zeros_(parameter)

    def unpatchify(self, tokens: Tensor) -> Tensor:
        """Assemble tokens [B, T, p*p*C_out] into images [B, C_out, H, W]."""
        grid, patch = self.input_size // self.patch_size, self.patch_size
        x = tokens.reshape(-1, grid, grid, patch, patch, self.out_channels)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(
            -1, self.out_channels, self.input_size, self.input_size
        )

    def drop_labels(self, y: Tensor, uniform: Tensor) -> Tensor:
        """Replace labels by the null label where uniform [B] in [0, 1) is below the dropout rate.

        The draw is the caller's, so that training is a function of (seed, step) alone.
        """
        if self.class_dropout_prob <= 0:
            return y
        return torch.where(uniform < self.class_dropout_prob, self.null_label, y)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        tokens = self.x_embedder(x) + self.pos_embed
        condition = self.t_embedder(t) + self.y_embedder(y)
        tokens = self.blocks(tokens, condition)
        return self.unpatchify(self.final_layer(tokens, condition))

    def forward_with_cfg(self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float) -> Tensor:
        """Guided prediction on a doubled batch: first half conditional, second half null.

        eps = eps_null + cfg_scale * (eps_cond - eps_null) on the first three channels only, as
        the released sampler does; both halves of the result carry the guided epsilon.
        """
        half = x[: len(x) // 2]
        out = self(torch.cat([half, half]), t, y)
        guided = min(CFG_GUIDED_CHANNELS, self.in_channels)
        cond, null = out[:, :guided].chunk(2)
        eps = null + cfg_scale * (cond - null)
        return torch.cat([torch.cat([eps, eps]), out[:, guided:]], dim=1)
