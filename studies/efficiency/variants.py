"""The models that `study efficiency` times: five full-precision baselines, two peers, and ours.

All have the workload's sizes and random weights with open gates; none is trained, which changes
neither bytes nor times.
"""

from __future__ import annotations

import gc
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

import torch
from torch import Tensor, nn

from robuq_bench.accounting.account import with_branch_rank
from robuq_bench.config import Plan, load_plan
from robuq_bench.diffusion import Diffusion
from robuq_bench.errors import UsageError, suggest
from robuq_bench.measuring.fp8 import fp8_, has_fp8
from robuq_bench.models.dit import CFG_GUIDED_CHANNELS, DiT

CFG_SCALE = 1.5
GATE_STD = 0.02


@dataclass(frozen=True)
class Variant:
    """How a model runs. `plan` is that of a packed model, `peer` whose 8-bit layers it has."""

    name: str
    label: str
    dtype: torch.dtype
    tf32: bool = False
    compiled: bool = False
    graph: bool = False
    plan: str = ""
    peer: Literal["", "torchao", "fp8"] = ""


_BF16 = torch.bfloat16
VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("fp32", "fp32 eager, TF32 off", torch.float32),
        Variant("tf32", "fp32 eager, TF32 on", torch.float32, tf32=True),
        Variant("bf16", "bf16 eager", _BF16),
        Variant("bf16-compile", "bf16 compiled", _BF16, compiled=True),
        Variant("bf16-graph", "bf16 compiled + CUDA graph", _BF16, compiled=True, graph=True),
        Variant(
            "torchao-int8",
            "torchao int8 compiled + CUDA graph",
            _BF16,
            compiled=True,
            graph=True,
            peer="torchao",
        ),
        Variant(
            "fp8-rowwise",
            "fp8 rowwise compiled + CUDA graph",
            _BF16,
            compiled=True,
            graph=True,
            peer="fp8",
        ),
        Variant("w1.58a8", "W1.58A8 packed + CUDA graph", _BF16, graph=True, plan="a8"),
        Variant("w1.58a4", "W1.58A4 packed + CUDA graph", _BF16, graph=True, plan="a4"),
        Variant("w1.58a2", "W1.58A2 packed + CUDA graph", _BF16, graph=True, plan="a2-uniform"),
    )
}


class NotRunError(Exception):
    """A variant cannot run here; the message says why."""


def variant_of(name: str) -> Variant:
    """The variant called `name`; UsageError with the nearest name otherwise."""
    if name not in VARIANTS:
        raise UsageError(f"efficiency.variants: unknown {name!r}{suggest(name, VARIANTS)}")
    return VARIANTS[name]


def packed_plan(name: str, rank: int) -> Plan:
    """A plan as it is packed here: with branches of `rank` (0: none), and else as it is judged."""
    return with_branch_rank(load_plan(name), rank)


def build(
    variant: Variant, model_config: Any, rank: int, seed: int, device: str, backend: str = "triton"
) -> nn.Module:
    """The model of a variant on `device`, in eval mode, without gradients.

    Raises:
        NotRunError: a package or fp8 is missing.
    """
    torch.manual_seed(seed)
    if variant.plan:
        from robuq_bench.inference import prepare_for_inference
        from robuq_bench.inference.random_weights import pack_random_

        with torch.device(device):  # on a CPU the random numbers alone take a minute
            model = _random_dit(model_config)
        pack_random_(model, packed_plan(variant.plan, rank), seed)
        # Through the CPU, so that no memory stays fragmented between what was packed.
        model.to("cpu")
        release()
        return prepare_for_inference(model.to(device), backend, variant.dtype)
    if variant.peer == "torchao" and importlib.util.find_spec("torchao") is None:
        raise NotRunError("not run: torchao is not installed")
    if variant.peer == "fp8" and not has_fp8(device):
        raise NotRunError("not run: needs a GPU of compute capability 8.9")
    with torch.device(device):
        model = _random_dit(model_config).to(variant.dtype)
    model.eval().requires_grad_(False)
    if variant.peer == "fp8":
        model = fp8_(model)
    if variant.peer == "torchao":
        torchao = import_module("torchao.quantization")
        torchao.quantize_(model, torchao.Int8DynamicActivationInt8WeightConfig())
    return model


def _random_dit(model_config: Any) -> nn.Module:
    model = DiT.from_config(model_config)
    for name, parameter in model.named_parameters():
        # adaLN-Zero would make every block the identity, and its outputs zeros.
        if "adaLN_modulation" in name or name.startswith("final_layer.linear"):
            nn.init.normal_(parameter, std=GATE_STD)
    return model


@contextmanager
def matmul_precision(tf32: bool) -> Iterator[None]:
    """Allow or forbid TF32 in products and convolutions, for the length of a block."""
    kept = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = kept


def ddim_coefficients(diffusion: Diffusion, steps: int) -> tuple[Tensor, Tensor]:
    """Timesteps int64 [steps], noisiest first, and coefficients float32 [steps, 2] of DDIM.

    Deterministic DDIM (Song et al. 2021, eta = 0) on 0, T/steps, 2T/steps, ... is
    x <- a x + b epsilon with a = sqrt(A' / A), b = sqrt(1 - A') - a sqrt(1 - A), where A is the
    cumulative product of alphas at t, and A' that at the next timestep, 1 at the end.
    """
    total = diffusion.num_train_timesteps
    if not 1 <= steps <= total or total % steps:
        raise UsageError(f"efficiency.sampling_steps must divide {total}, got {steps}")
    timesteps = torch.arange(0, total, total // steps).flip(0)
    now = diffusion.alphas_cumprod[timesteps]
    following = torch.cat([now[1:], torch.ones(1, dtype=now.dtype)])
    a = (following / now).sqrt()
    b = (1 - following).sqrt() - a * (1 - now).sqrt()
    return timesteps, torch.stack([a, b], dim=1).float()


class Sampler:
    """A model with its inputs in fixed memory, as a CUDA graph needs them.

    Attributes:
        x: latents [batch, C, H, W] in the model's dtype.
        timestep: int64 [1]; coefficients: float32 [2].
    """

    def __init__(
        self, model: nn.Module, model_config: Any, dtype: torch.dtype, batch: int, guided: bool,
        device: str, seed: int,
    ) -> None:  # fmt: skip
        generator = torch.Generator(device).manual_seed(seed)
        size = model_config.input_size
        self.model, self.guided = model, guided
        self.channels = model_config.in_channels
        shape = (batch, self.channels, size, size)
        self.noise = torch.randn(shape, generator=generator, device=device).to(dtype)
        self.x = self.noise.clone()
        labels = torch.randint(
            model_config.num_classes, (batch,), generator=generator, device=device
        )
        if guided:
            labels = torch.cat([labels, torch.full_like(labels, int(model_config.num_classes))])
        self.labels = labels
        self.timestep = torch.full((1,), 500, device=device)
        self.coefficients = torch.tensor([1.0, 0.0], device=device)

    def predict(self) -> Tensor:
        """Epsilon [batch, C, H, W], guided on the first three channels where `guided`."""
        x = torch.cat([self.x, self.x]) if self.guided else self.x
        out = self.model(x, self.timestep.expand(len(x)), self.labels)[:, : self.channels]
        if not self.guided:
            return out
        conditional, null = out.chunk(2)
        count = min(CFG_GUIDED_CHANNELS, self.channels)
        guided = null[:, :count] + CFG_SCALE * (conditional[:, :count] - null[:, :count])
        return torch.cat([guided, conditional[:, count:]], dim=1)

    def step(self, predict: Callable[[], Tensor]) -> Tensor:
        """One DDIM update of `x` in place."""
        a, b = self.coefficients.to(self.x.dtype).unbind(0)
        return self.x.copy_(a * self.x + b * predict())

    def sample(self, step: Callable[[], object], timesteps: Tensor, coefficients: Tensor) -> None:
        """All steps from the same noise; `step` runs `self.step`, or replays a graph of it."""
        self.x.copy_(self.noise)
        for index in range(len(timesteps)):
            self.timestep.copy_(timesteps[index : index + 1])
            self.coefficients.copy_(coefficients[index])
            step()


def release() -> None:
    """Give the memory of models that are no longer referenced back to the device."""
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()
