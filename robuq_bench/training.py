"""The training loop shared by teachers and quantization-aware training (QAT).

A step is a pure function of (weights, optimizer state, seed, step number): the batch, timesteps,
noise and label dropout are drawn from a generator seeded by (stream, seed, step). A killed run
therefore continues from its last checkpoint to the bit-identical weights (same thread count).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from robuq_bench import seeds
from robuq_bench.diffusion import Diffusion
from robuq_bench.errors import CheckpointError, DivergedError
from robuq_bench.quantization.linear import OLD_NAMES

logger = logging.getLogger(__name__)

ADAM_BETAS = (0.9, 0.999)
LOW_RANK_PARAMETERS = (".branch.up", ".branch.down")
GRID_SLOTS = (".weight_quantizer.", ".activation_quantizer.")
OLD_BRANCH = ("low_rank_up", "low_rank_down")


class Recipe(Protocol):
    """Training fields of a workload's `training` or `teacher.training` section (read-only)."""

    @property
    def steps(self) -> int: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def learning_rate(self) -> float: ...
    @property
    def warmup_steps(self) -> int: ...
    @property
    def min_learning_rate_ratio(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def grad_clip_norm(self) -> float: ...
    @property
    def ema_decay(self) -> float: ...
    @property
    def checkpoint_every_steps(self) -> int: ...
    @property
    def log_every_steps(self) -> int: ...
    @property
    def precision(self) -> str: ...
    @property
    def compile(self) -> bool: ...


@dataclass(frozen=True)
class Batch:
    """One diffusion training batch: x0, noise, x_t [B, C, H, W]; t, y [B] int64."""

    x0: Tensor
    noise: Tensor
    x_t: Tensor
    t: Tensor
    y: Tensor


LossFunction = Callable[[nn.Module, Batch], dict[str, Tensor]]


class BatchSource:
    """Random-access batches: `batch(step)` always returns the same batch.

    images: float [N, C, H, W] in the model's range; labels: int64 [N]. Sampling is with
    replacement, which needs no epoch state.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        diffusion: Diffusion,
        model: Any,
        *,
        batch_size: int,
        seed: int,
        stream: str,
        device: str | torch.device,
    ) -> None:
        self.images, self.labels, self.diffusion = images, labels, diffusion
        self.drop_labels = model.drop_labels
        self.batch_size, self.seed, self.stream, self.device = batch_size, seed, stream, device

    def batch(self, step: int) -> Batch:
        """Return the batch of training step `step`, on the source's device."""
        generator = seeds.generator(self.stream, self.seed, step)
        index = torch.randint(len(self.images), (self.batch_size,), generator=generator)
        t = torch.randint(
            self.diffusion.num_train_timesteps, (self.batch_size,), generator=generator
        )
        uniform = torch.rand(self.batch_size, generator=generator)
        x0 = self.images[index]
        noise = torch.randn(x0.shape, generator=generator)
        y = self.drop_labels(self.labels[index], uniform)
        x_t = self.diffusion.q_sample(x0, t, noise)
        return Batch(*(tensor.to(self.device) for tensor in (x0, noise, x_t, t, y)))


def denoising_loss(diffusion: Diffusion) -> LossFunction:
    """Loss of a full-precision model: epsilon MSE (plus the variational bound if it has sigma)."""

    def loss(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        output = model(batch.x_t, batch.t, batch.y).float()
        value = diffusion.training_loss(output, batch.x0, batch.x_t, batch.t, batch.noise).mean()
        return {"loss": value, "denoising_loss": value.detach()}

    return loss


def qat_loss(
    diffusion: Diffusion, teacher: nn.Module, distillation_weight: float, denoising_weight: float
) -> LossFunction:
    """QAT loss: w_d * mean ||output - teacher output||^2 + w_e * denoising loss.

    Distillation compares every output channel, so a learned sigma follows the teacher's too.
    """

    def loss(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        output = model(batch.x_t, batch.t, batch.y).float()
        with torch.no_grad():
            target = teacher(batch.x_t, batch.t, batch.y).float()
        distillation = (output - target).square().mean()
        denoising = diffusion.training_loss(
            output, batch.x0, batch.x_t, batch.t, batch.noise
        ).mean()
        total = distillation_weight * distillation + denoising_weight * denoising
        return {
            "loss": total,
            "distillation_loss": distillation.detach(),
            "denoising_loss": denoising.detach(),
        }

    return loss


def learning_rate_at(recipe: Recipe, step: int) -> float:
    """Linear warm-up, then cosine decay to `min_learning_rate_ratio` of the peak at the end."""
    if step < recipe.warmup_steps:
        return recipe.learning_rate * (step + 1) / recipe.warmup_steps
    progress = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    floor = recipe.min_learning_rate_ratio
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return recipe.learning_rate * (floor + (1 - floor) * cosine)


def _parameter_groups(
    parameters: dict[str, nn.Parameter], learning_rate: float, low_rank_learning_rate: float | None
) -> list[dict[str, Any]]:
    """AdamW's groups; `rate_ratio` is what multiplies the scheduled learning rate."""
    ratio = 1.0 if low_rank_learning_rate is None else low_rank_learning_rate / learning_rate
    branch = {n for n in parameters if f".{n}".endswith(LOW_RANK_PARAMETERS) and ratio != 1.0}
    grids = {n for n in parameters if any(slot in f".{n}" for slot in GRID_SLOTS)}
    rest = parameters.keys() - branch - grids
    groups: list[dict[str, Any]] = [
        {"params": [p for n, p in parameters.items() if n in rest], "rate_ratio": 1.0},
        {"params": [p for n, p in parameters.items() if n in branch], "rate_ratio": ratio},
        # A step that decays is a finer grid, not a simpler model.
        {
            "params": [p for n, p in parameters.items() if n in grids],
            "rate_ratio": 1.0,
            "weight_decay": 0.0,
        },
    ]
    return [group for group in groups if group["params"]]


def _name_of_today(key: str) -> str:
    """The key of a checkpoint's tensor, which older code may have called otherwise."""
    layer, _, last = key.rpartition(".")
    return f"{layer}.{OLD_NAMES[last]}" if last in OLD_BRANCH else key


class Trainer:
    """Model, EMA and AdamW state with deterministic steps and exact checkpoints.

    `model` holds the trained weights, `ema` their exponential moving average (same keys). The
    low-rank branches have a peak learning rate of their own where one is given, with the same
    warm-up and decay.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        device: str | torch.device,
        low_rank_learning_rate: float | None = None,
    ) -> None:
        self.model, self.recipe, self.device = model, recipe, torch.device(device)
        self.step = 0
        self.window: list[dict[str, float]] = []  # losses since the last logged line or checkpoint
        self.unlogged_cost: dict[str, float] = {}  # of earlier sessions since their last line
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.ema = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.optimizer = torch.optim.AdamW(
            _parameter_groups(self.parameters, recipe.learning_rate, low_rank_learning_rate),
            lr=recipe.learning_rate,
            betas=ADAM_BETAS,
            weight_decay=recipe.weight_decay,
            fused=True,
        )
        on_gpu = self.device.type == "cuda"
        if not on_gpu and (recipe.precision != "fp32" or recipe.compile):
            # bf16 and inductor are slower than eager fp32 on CPUs without AMX.
            logger.warning("training in eager fp32: precision and compile apply to CUDA only")
        if 0 < recipe.steps <= recipe.warmup_steps:
            logger.warning(
                "the learning rate rises until training ends, to %.0f%% of its peak: "
                "warmup_steps = %d of steps = %d; lower training.warmup_steps",
                100 * recipe.steps / recipe.warmup_steps,
                recipe.warmup_steps,
                recipe.steps,
            )
        self.use_bf16 = on_gpu and recipe.precision == "bf16"
        self.forward_model: nn.Module = model
        if on_gpu and recipe.compile:
            self.forward_model = torch.compile(model)  # type: ignore[assignment]

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.use_bf16:
            return torch.autocast("cuda", dtype=torch.bfloat16)
        return nullcontext()

    def train(
        self, source: BatchSource, loss_function: LossFunction, until: int
    ) -> Iterator[dict[str, float]]:
        """Run steps `self.step .. until - 1`, yielding each step's losses and gradient norm.

        Raises DivergedError naming the step when the loss stops being finite.
        """
        self.model.train()
        while self.step < until:
            learning_rate = learning_rate_at(self.recipe, self.step)
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate * group["rate_ratio"]
            with self._autocast():
                losses = loss_function(self.forward_model, source.batch(self.step))
            losses["loss"].backward()
            norm = nn.utils.clip_grad_norm_(
                list(self.parameters.values()), self.recipe.grad_clip_norm
            )
            values = {name: float(value.detach()) for name, value in losses.items()}
            if not math.isfinite(values["loss"]) or not math.isfinite(float(norm)):
                raise DivergedError(
                    f"training diverged at step {self.step}: loss {values['loss']}, gradient norm "
                    f"{float(norm)}; lower training.learning_rate or raise training.warmup_steps"
                )
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            with torch.no_grad():
                torch._foreach_lerp_(
                    list(self.ema.values()),
                    [p.detach() for p in self.parameters.values()],
                    1 - self.recipe.ema_decay,
                )
            self.step += 1
            yield {**values, "learning_rate": learning_rate, "grad_norm": float(norm)}

    def state(self) -> dict[str, Tensor]:
        """Everything a bit-identical continuation needs, as flat named tensors on the CPU."""
        tensors = {f"model/{n}": p.detach() for n, p in self.parameters.items()}
        tensors |= {f"ema/{n}": p for n, p in self.ema.items()}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"adamw/{key}/{name}"] = value
        return {key: value.detach().cpu().contiguous() for key, value in tensors.items()}

    def load_state(self, step: int, tensors: dict[str, Tensor], origin: str) -> None:
        """Restore `state()`; CheckpointError naming `origin` when tensors do not fit the model."""
        tensors = {_name_of_today(key): value for key, value in tensors.items()}
        expected = {f"{part}/{n}" for n in self.parameters for part in ("model", "ema")}
        missing = sorted(expected - tensors.keys())
        if missing:
            raise CheckpointError(
                f"{origin}: checkpoint lacks {len(missing)} tensors, first {missing[0]!r}; "
                "it belongs to another plan or model: use --force to start this run afresh"
            )
        for key, value in tensors.items():
            parameter = self.parameters.get(key.rpartition("/")[2])
            if parameter is None or key.startswith("adamw/step/"):
                continue
            if value.shape != parameter.shape:  # copy_ would stretch a smaller one without a word
                raise CheckpointError(
                    f"{origin}: {key!r} is {list(value.shape)}, the model's "
                    f"{list(parameter.shape)}; it belongs to another plan or model: use --force "
                    "to start this run afresh"
                )
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[f"model/{name}"])
                self.ema[name].copy_(tensors[f"ema/{name}"])
                # Fused AdamW walks memory: its moments must have the parameter's own strides.
                state = {
                    key: torch.empty_like(parameter).copy_(tensors[f"adamw/{key}/{name}"])
                    for key in ("exp_avg", "exp_avg_sq")
                    if f"adamw/{key}/{name}" in tensors
                }
                if state:
                    state["step"] = tensors[f"adamw/step/{name}"].to(self.device)
                    self.optimizer.state[parameter] = state
        self.step = step

    def copy_ema_to(self, model: nn.Module) -> None:
        """Load the averaged weights into `model` (buffers untouched)."""
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in self.ema:
                    parameter.copy_(self.ema[name])
