"""Outliers in a teacher's activations that leave its function as it is.

Channels at the input of a linear layer are multiplied by s and the layer's columns for them divided
by s, so that activations become harder to quantize while the output stays. What multiplies them
comes before the layer and must be linear there:

- qkv and fc1 take (1 + scale) · norm(x) + shift of adaLN: shift' = s · shift, and
  scale' = s (1 + scale) - 1, both rows of the modulation's linear layer;
- proj takes attention-weighted sums of the values V: rows of V, weight and bias, times s;
- fc2 takes GELU(fc1(x)), and GELU(s u) is not s GELU(u): it has no such outliers.

For a power of two, products by s and 1/s are exact in binary floating point; what rounds is the
addition in 1 + scale'. So outliers of proj change no bit, and those of qkv and fc1 the last ones.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robuq_bench import seeds
from robuq_bench.config.workload import OutliersConfig
from robuq_bench.errors import UsageError
from robuq_bench.models.dit import DiT, DiTBlock

TOLERANCE = 1e-5
"""Largest relative change of the output on the fixed batch."""

CHECKED_IMAGES = 4
#: Thirds of a qkv layer's rows, and sixths of a modulation's: shift and scale of attention and MLP.
_VALUES = 2
_SHIFT = {"qkv": 0, "fc1": 3}


@torch.no_grad()
def add_outliers_(model: nn.Module, outliers: OutliersConfig) -> dict[str, Tensor]:
    """Put outliers into a DiT of any size, in place.

    A layer's channels depend on its name and the seed alone, so that another `scale`, or a choice
    of other `layers`, keeps them.

    Args:
        model: float32 or float64, on any device; its parameters are changed.
        outliers: how large, how many, and where.

    Returns:
        {layer: its outlier channels, int64 [channels], ascending}, such as "blocks.0.attn.qkv".

    Raises:
        UsageError: not the DiT of this suite; more channels than it has; or the output on a fixed
            batch of noise changed by more than `TOLERANCE`, as it does by rounding at extreme
            scales. The model is then no teacher any more.
    """
    if not isinstance(model, DiT):
        raise UsageError(
            f"teacher.outliers: {type(model).__name__} is not the DiT of this suite, whose layers "
            "they are made for; weights in diffusers' layout load as one (`load_teacher`)"
        )
    before = _outputs(model)
    found: dict[str, Tensor] = {}
    for name, block in model.blocks.named_children():
        assert isinstance(block, DiTBlock)
        for layer in outliers.layers:
            linear = block.mlp.fc1 if layer == "fc1" else getattr(block.attn, layer)
            path = f"blocks.{name}.{'mlp' if layer == 'fc1' else 'attn'}.{layer}"
            heads = block.attn.num_heads if layer == "proj" else 1
            channels = outlier_channels(path, linear.in_features, outliers, heads)
            found[path] = channels
            _scale_input(block, layer, linear, channels.to(linear.weight.device), outliers.scale)
    change, norm = (_outputs(model) - before).norm(dim=1), before.norm(dim=1)
    if not bool((change <= TOLERANCE * norm).all()):  # NaN must not pass
        raise UsageError(
            f"teacher.outliers: scale = {outliers.scale:g} changes the teacher's output by "
            f"{float((change / norm).max()):.1e} of its norm, more than {TOLERANCE:g}: float32 "
            "rounds too much there; choose one nearer 1, best a power of two"
        )
    return found


def outlier_channels(layer: str, width: int, outliers: OutliersConfig, heads: int = 1) -> Tensor:
    """The channels of one layer, int64 [channels], ascending, without repeats.

    They are dealt to the heads as evenly as can be: the values of one head share its attention
    pattern, so two outliers in a head would be one direction rather than two.

    Raises:
        UsageError: there are fewer than `outliers.channels`.
    """
    if outliers.channels > width:
        raise UsageError(
            f"teacher.outliers.channels is {outliers.channels}, but {layer} has {width} inputs"
        )
    generator = seeds.generator("outliers", outliers.seed, layer)
    shuffled = torch.rand(heads, width // heads, generator=generator).argsort(dim=1)
    order = torch.randperm(heads, generator=generator)[:, None]
    dealt = (order * (width // heads) + shuffled[order.squeeze(1)]).T.flatten()
    return dealt[: outliers.channels].sort().values


def _scale_input(
    block: DiTBlock, layer: str, linear: nn.Linear, channels: Tensor, scale: float
) -> None:
    """Multiply what reaches these channels of `linear`, and divide its columns for them."""
    width = linear.in_features
    if layer == "proj":
        source, rows = block.attn.qkv, _VALUES * width + channels
    else:
        modulation = block.adaLN_modulation[1]
        assert isinstance(modulation, nn.Linear)
        source, rows = modulation, _SHIFT[layer] * width + channels
        source.weight[rows + width] *= scale
        # s (1 + b) - 1, in a form that is b itself for s = 1
        source.bias[rows + width] = scale * source.bias[rows + width] + (scale - 1)
    source.weight[rows] *= scale
    source.bias[rows] *= scale
    linear.weight[:, channels] /= scale


def _outputs(model: DiT) -> Tensor:
    """What the model makes of a fixed batch of noise, [images, elements] float64."""
    generator = seeds.generator("outliers/check", 0)
    size, like = (model.in_channels, model.input_size, model.input_size), model.pos_embed
    x = torch.randn(CHECKED_IMAGES, *size, generator=generator)
    t = torch.linspace(0, 999, CHECKED_IMAGES).long()
    y = torch.randint(model.num_classes, (CHECKED_IMAGES,), generator=generator)
    was_training = model.training
    out = model.eval()(x.to(like), t.to(like.device), y.to(like.device))
    model.train(was_training)
    return out.double().flatten(1)
