"""Training is a pure function of seed and step: determinism, exact resume, schedule, failures."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from robuq_bench.diffusion import Diffusion
from robuq_bench.errors import CheckpointError, RobuqError
from robuq_bench.methods.branches.svd import LowRankBranch
from robuq_bench.models.dit import DiT
from robuq_bench.training import (
    BatchSource,
    Trainer,
    denoising_loss,
    learning_rate_at,
    qat_loss,
)


@dataclasses.dataclass
class TinyRecipe:
    steps: int = 12
    batch_size: int = 4
    learning_rate: float = 1e-2
    warmup_steps: int = 3
    min_learning_rate_ratio: float = 0.1
    weight_decay: float = 0.01
    grad_clip_norm: float = 1.0
    ema_decay: float = 0.9
    checkpoint_every_steps: int = 5
    log_every_steps: int = 1
    precision: str = "fp32"
    compile: bool = False


def tiny_model() -> DiT:
    torch.manual_seed(3)
    return DiT(
        input_size=4,
        in_channels=1,
        hidden_size=16,
        depth=1,
        num_heads=2,
        num_classes=3,
        learn_sigma=False,
    )


def tiny_source(model: DiT, seed: int = 0) -> BatchSource:
    images = torch.rand(20, 1, 4, 4, generator=torch.Generator().manual_seed(1)) * 2 - 1
    labels = torch.arange(20) % 3
    return BatchSource(
        images,
        labels,
        Diffusion(),
        model,
        batch_size=4,
        seed=seed,
        stream="test",
        device="cpu",
    )


def train(trainer: Trainer, until: int) -> list[dict[str, float]]:
    assert isinstance(trainer.model, DiT)
    source = tiny_source(trainer.model)
    return list(trainer.train(source, denoising_loss(Diffusion()), until))


def weights(trainer: Trainer) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in trainer.state().items()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different


def test_batches_depend_on_seed_and_step_alone() -> None:
    model = tiny_model()
    first, second = tiny_source(model), tiny_source(model)
    second.batch(7)  # reading another batch first must not matter
    for a, b in zip(
        dataclasses.astuple(first.batch(3)), dataclasses.astuple(second.batch(3)), strict=True
    ):
        assert torch.equal(a, b)
    assert not torch.equal(first.batch(3).noise, first.batch(4).noise)
    assert not torch.equal(first.batch(3).noise, tiny_source(model, seed=1).batch(3).noise)


def test_two_runs_are_bit_identical() -> None:
    first, second = (
        Trainer(tiny_model(), TinyRecipe(), "cpu"),
        Trainer(tiny_model(), TinyRecipe(), "cpu"),
    )
    assert train(first, 12) == train(second, 12)
    assert_same(weights(first), weights(second))


@pytest.mark.parametrize("stop", [1, 5, 11])
def test_resume_is_bit_identical(stop: int) -> None:
    whole = Trainer(tiny_model(), TinyRecipe(), "cpu")
    expected = train(whole, 12)
    part = Trainer(tiny_model(), TinyRecipe(), "cpu")
    seen = train(part, stop)
    resumed = Trainer(tiny_model(), TinyRecipe(), "cpu")
    resumed.load_state(stop, weights(part), "memory")
    seen += train(resumed, 12)
    assert seen == expected
    assert_same(weights(resumed), weights(whole))


def test_training_learns() -> None:
    recipe = TinyRecipe(steps=150, warmup_steps=10)
    losses = [row["loss"] for row in train(Trainer(tiny_model(), recipe, "cpu"), 150)]
    assert sum(losses[-20:]) < 0.9 * sum(losses[:20])


def test_ema_matches_its_recurrence() -> None:
    trainer = Trainer(tiny_model(), TinyRecipe(), "cpu")
    name = "blocks.0.attn.qkv.weight"
    expected = trainer.parameters[name].detach().clone()
    source = tiny_source(trainer.model)  # type: ignore[arg-type]
    for _ in trainer.train(source, denoising_loss(Diffusion()), 4):
        expected = 0.9 * expected + 0.1 * trainer.parameters[name].detach()
    torch.testing.assert_close(trainer.ema[name], expected, rtol=1e-6, atol=1e-7)
    trainer.copy_ema_to(trainer.model)
    assert torch.equal(trainer.parameters[name], trainer.ema[name])


def test_learning_rate_warms_up_and_decays_to_its_floor() -> None:
    recipe = TinyRecipe(steps=100, warmup_steps=10)
    rates = [learning_rate_at(recipe, step) for step in range(100)]
    assert rates[0] == pytest.approx(1e-3)
    assert max(rates) == pytest.approx(1e-2)
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))
    assert learning_rate_at(recipe, 100) == pytest.approx(1e-3)
    middle = learning_rate_at(recipe, 55)
    assert middle == pytest.approx(1e-3 + 9e-3 * 0.5 * (1 + math.cos(math.pi / 2)))


class Branched(nn.Module):
    """A weight and a low-rank branch, all of whose gradients have the same size."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4))
        self.layer = nn.Module()
        self.layer.branch = LowRankBranch(torch.zeros(4, 1), torch.zeros(1, 4))

    def drop_labels(self, y: Tensor, uniform: Tensor) -> Tensor:
        return y


def branched(rate: float | None) -> tuple[Trainer, list[float]]:
    trainer = Trainer(Branched(), TinyRecipe(weight_decay=0.0), "cpu", rate)

    def loss(model: nn.Module, batch: object) -> dict[str, Tensor]:
        return {"loss": torch.cat([p.flatten() for p in model.parameters()]).sum()}

    source = tiny_source(trainer.model)  # type: ignore[arg-type]
    return trainer, [row["learning_rate"] for row in trainer.train(source, loss, 6)]


def test_the_branch_has_its_own_learning_rate() -> None:
    shared, rates = branched(None)
    same, _ = branched(1e-2)
    own, own_rates = branched(1e-3)
    assert_same(weights(shared), weights(same))
    assert own_rates == rates  # what is logged is the main rate
    assert torch.equal(own.parameters["weight"], shared.parameters["weight"])
    for name in ("layer.branch.up", "layer.branch.down"):
        ratio = own.parameters[name] / shared.parameters[name]
        assert ((ratio > 0.099) & (ratio < 0.102)).all()  # Adam's steps are as long as its rate
    resumed = Trainer(Branched(), TinyRecipe(weight_decay=0.0), "cpu", 1e-3)
    resumed.load_state(6, weights(own), "memory")
    assert_same(weights(resumed), weights(own))


def test_a_checkpoint_of_older_code_called_the_branch_otherwise() -> None:
    trainer, _ = branched(1e-3)
    renamed = {"layer.branch.up": "layer.low_rank_up", "layer.branch.down": "layer.low_rank_down"}
    old = {}
    for key, value in weights(trainer).items():
        part, _, name = key.rpartition("/")
        old[f"{part}/{renamed.get(name, name)}"] = value
    assert len(old.keys() - weights(trainer).keys()) == 2 * 5  # model, EMA, steps, moments
    resumed = Trainer(Branched(), TinyRecipe(weight_decay=0.0), "cpu", 1e-3)
    resumed.load_state(6, old, "memory")
    assert_same(weights(resumed), weights(trainer))


def test_a_model_without_a_branch_takes_any_rate_for_it() -> None:
    alone, given = (Trainer(tiny_model(), TinyRecipe(), "cpu", rate) for rate in (None, 1.0))
    assert train(alone, 3) == train(given, 3)
    assert_same(weights(alone), weights(given))


def test_divergence_names_the_step() -> None:
    trainer = Trainer(tiny_model(), TinyRecipe(), "cpu")
    train(trainer, 2)
    with torch.no_grad():
        trainer.parameters["final_layer.linear.bias"].fill_(float("inf"))
    with pytest.raises(RobuqError, match=r"diverged at step 2.*learning_rate"):
        train(trainer, 3)


def test_checkpoint_of_another_model_is_refused() -> None:
    trainer = Trainer(tiny_model(), TinyRecipe(), "cpu")
    state = {k: v for k, v in weights(trainer).items() if "qkv" not in k}
    with pytest.raises(CheckpointError, match=r"there\.safetensors.*qkv"):
        trainer.load_state(1, state, "there.safetensors")


@pytest.mark.parametrize("part", ["model", "ema", "adamw/exp_avg"])
def test_a_checkpoint_of_another_shape_is_refused(part: str) -> None:
    """One that `copy_` would stretch to fit."""
    trainer = Trainer(tiny_model(), TinyRecipe(), "cpu")
    train(trainer, 1)
    key = f"{part}/final_layer.linear.bias"
    state = weights(trainer) | {key: torch.zeros(1)}
    with pytest.raises(CheckpointError, match=rf"there\.safetensors: '{key}' is \[1\]"):
        trainer.load_state(1, state, "there.safetensors")


def test_qat_loss_is_zero_distillation_for_the_teacher_itself() -> None:
    teacher = tiny_model()
    nn.init.normal_(teacher.final_layer.linear.weight, generator=torch.Generator().manual_seed(0))
    loss = qat_loss(Diffusion(), teacher, distillation_weight=1.0, denoising_weight=0.25)
    batch = tiny_source(teacher).batch(0)
    values = loss(teacher, batch)
    assert values["distillation_loss"] == 0
    direct = (teacher(batch.x_t, batch.t, batch.y) - batch.noise).square().mean()
    torch.testing.assert_close(values["loss"], 0.25 * direct)


def test_label_dropout_rate() -> None:
    model = tiny_model()
    y = model.drop_labels(torch.zeros(10_000, dtype=torch.int64), torch.rand(10_000))
    share = (y == model.null_label).float().mean().item()
    assert share == pytest.approx(0.1, abs=0.015)


@pytest.mark.parametrize(("steps", "rises"), [(4, True), (5, True), (6, False)])
def test_a_warm_up_that_never_ends_is_told(
    steps: int, rises: bool, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = dataclasses.replace(TinyRecipe(), warmup_steps=5, steps=steps)
    Trainer(tiny_model(), recipe, "cpu")
    assert (f"to {20 * steps}% of its peak: warmup_steps = 5" in caplog.text) == rises
    assert ("warmup_steps" in caplog.text) == rises
