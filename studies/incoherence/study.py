"""Does rotation help against outliers? Error of quantized students, dose by dose.

Two channels at the inputs of qkv, proj and fc1 are scaled up by s and their weights down, which
leaves the teacher's function (`models/outliers.py`). A plan is taken with one rotation after
another in all its rules, at few activation bits, and its students are judged before and after a
short training. s changes the weights too, and with them what a weight quantizer rounds and a branch
takes. So what is judged is the error of activations alone: with unquantized weights, how far
predictions on images of fixed noise move when activations are quantized, squared, over the
teacher's own energy. Beside it stand the student's error against the teacher as it is, and with
unquantized activations. A training seed decides batches, random signs and which channels are
scaled, and is the same at every dose and rotation, so that slopes are paired. `RULE` was fixed
before any number was seen.

Beside it, per layer type: the error of the layer's output by its quantized input, over the part of
the output that tells tokens apart, and how far the largest inputs stand out once they are rotated.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from robuq_bench.accounting.structure import dit_structure
from robuq_bench.config import Config, Plan
from robuq_bench.config.workload import OutliersConfig
from robuq_bench.context import Context
from robuq_bench.data.datasets import ImageData, load_dataset, load_heldout
from robuq_bench.diffusion import Diffusion
from robuq_bench.errors import ConfigError, DivergedError, UsageError
from robuq_bench.judging.sampling import evaluation_mode, shard
from robuq_bench.methods import read_method
from robuq_bench.models.checkpoints import load_teacher
from robuq_bench.models.dit import DiT
from robuq_bench.models.outliers import add_outliers_
from robuq_bench.normality.incoherence import Incoherence
from robuq_bench.progress import format_seconds
from robuq_bench.qat import prepare_training
from robuq_bench.quantization.convert import allocatable_layers, layer_type, quantized_layers
from robuq_bench.quantization.watching import find_layers, watching
from robuq_bench.runs.run import Run
from robuq_bench.sensitivity.local import local_errors
from robuq_bench.sensitivity.probing import rotated_input
from robuq_bench.statistics.comparisons import CONFIDENCE, MARGIN, MIN_SEEDS
from robuq_bench.training import Batch, BatchSource
from robuq_bench.trials import adopt_shards, check_choices, refuse_seed
from studies.incoherence.settings import LAYER_IMAGES, NONE, Settings
from studies.incoherence.tables import AFTER, BEFORE, DOUBLING, ERRORS, summarise

VERSION = "1"
SUMMARY = "Does rotation help against outliers? Error of students by the size of outliers."
RULE = (
    "The error is that of quantized activations with unquantized weights. A response is the slope "
    "of log error against log2 s, a line of least squares over the scales that are measured both "
    "before and after training, of each training seed. Its mean over seeds and the "
    f"{CONFIDENCE:.0%} t interval are given as factor of error per doubling of the outliers. "
    "“The error does not depend on outliers” holds if the interval lies within "
    f"1/{DOUBLING} to {DOUBLING}, does not hold if it lies wholly beyond one of them, and is "
    "undecided otherwise. Beside no rotation, slopes are paired by seed: equivalent if the "
    f"interval of the ratio of factors lies within 1/{DOUBLING} to {DOUBLING}, otherwise better or "
    "worse if it lies wholly below or above 1, otherwise undecided. So are the errors at the "
    f"greatest of these outliers, with {MARGIN} to 1/{MARGIN}. With fewer than {MIN_SEEDS} seeds, "
    "or where a training diverged: not judged. Verdicts before training are one family, those "
    "after it another: decided words must also survive Holm's correction; equivalent stands on its "
    "interval."
)

MACS_PER_SECOND = 16e9
"""Of training W1.58A4 on `digits` on one core of a Xeon with AVX-512, to estimate times."""


class Trial(NamedTuple):
    """A student: of a teacher with outliers of `scale`, the plan with `rotation` at `bits`."""

    scale: float
    rotation: str
    bits: int
    seed: int

    def key(self, when: str) -> str:
        """Its key in the run's records."""
        return f"trial/{when}/{self.scale:g}/{self.rotation}/{self.bits}/{self.seed}"


class HeldOut(NamedTuple):
    """Fixed batches, and what the teacher predicts on them; `energy` is its mean square."""

    batches: list[Batch]
    targets: list[Tensor]
    energy: float


def check(config: Config) -> None:
    """Refuse what the study would set twice, and rotations or bits that the plan cannot have."""
    options = config.settings_of(Settings)
    refuse_seed(config)
    if config.workload.teacher.outliers is not None:
        raise UsageError(
            f"study incoherence puts in outliers itself, and workload {config.workload.name!r} has "
            "some already; name the one that it extends, such as --on digits"
        )
    check_choices(config, options.bits, "incoherence.bits")
    for rotation in options.rotations:
        plan = plan_with(config.plan, rotation, options.bits[0], options.block)
        for layer in dit_structure(config.workload.model, plan).quantized:
            if layer.rule is not None and layer.rule.rotation is not None:
                try:
                    layer.rule.rotation.check(layer.out_features, layer.in_features)
                except (ConfigError, UsageError) as error:
                    raise type(error)(f"layer {layer.name!r}: {error}") from None


def outlook(config: Config) -> str:
    """How many students and trainings, and how long they may take on one core."""
    options = config.settings_of(Settings)
    trials = own_trials(options)
    trained = [trial for trial in trials if trial.scale in options.trained_scales]
    macs = dit_structure(config.workload.model, config.plan).macs
    # Forward passes: a student's three (two backward) and the teacher's; layers are run about four
    # times more.
    passes = 4 * len(trained) * options.steps * options.batch_size
    passes += (len(trials) + len(trained)) * (4 * options.images + 4 * LAYER_IMAGES)
    seconds = passes * macs / MACS_PER_SECOND
    return (
        f"{len(trials)} students, {len(trained)} of them trained for {options.steps} steps: about "
        f"{format_seconds(seconds)} at {MACS_PER_SECOND / 1e9:g} GMAC/s, as of one CPU core"
    )


def own_trials(options: Settings) -> list[Trial]:
    """The trials of this shard, seed by seed, so that a stopped study has whole seeds."""
    trials = [
        Trial(scale, rotation, bits, seed)
        for seed in range(options.seeds)
        for scale in options.scales
        for rotation in options.rotations
        for bits in options.bits
    ]
    return trials if options.shard is None else list(shard(trials, options.shard))


def measure(config: Config, run: Run, context: Context) -> list[dict[str, Any]]:
    """Judge every student (or those of this shard) that is not there yet, then summarise."""
    options, workload = config.settings_of(Settings), config.workload
    plain, digest = load_teacher(workload, context.device)
    run.add_input_digest("teacher", digest)
    data = load_dataset(workload.data, name=workload.name)
    run.add_input_digest("data", data.sha256, source=data.source)
    unseen = load_heldout(workload.data, name=workload.name)
    if unseen is not None:
        run.add_input_digest("heldout", unseen.sha256, source=unseen.source)
    held_out = make_held_out(config, context, plain, data if unseen is None else unseen)
    trials = own_trials(options)
    if options.shard is None:
        adopt_shards(run, config, "trial")
    missing = [trial for trial in trials if not all(run.has(key) for key in keys(trial, options))]
    made: tuple[tuple[float, int], DiT] | None = None
    with context.progress.task("students", len(trials), len(trials) - len(missing)) as task:
        for trial in missing:
            if made is None or made[0] != (trial.scale, trial.seed):
                teacher = copy.deepcopy(plain)
                outliers = OutliersConfig(
                    scale=trial.scale, channels=options.channels, seed=trial.seed
                )
                add_outliers_(teacher, outliers)
                made = (trial.scale, trial.seed), teacher
            task.update(f"s = {trial.scale:g}, {trial.rotation}, {trial.bits} bits")
            measure_trial(config, run, context, trial, made[1], data, held_out)
            task.advance()
    if options.shard is not None:
        return [{"shard": options.shard, "students": len(trials)}]
    return summarise(run, options, RULE)


def keys(trial: Trial, options: Settings) -> list[str]:
    """What a trial leaves in the run."""
    is_trained = trial.scale in options.trained_scales
    return [trial.key(when) for when in ((BEFORE, AFTER) if is_trained else (BEFORE,))]


def measure_trial(
    config: Config,
    run: Run,
    context: Context,
    trial: Trial,
    teacher: DiT,
    data: ImageData,
    held_out: HeldOut,
) -> None:
    """Judge a student before training, and after it if its scale is among the trained ones.

    A training that diverges is recorded without errors.
    """
    options = config.settings_of(Settings)
    plan = plan_with(config.plan, trial.rotation, trial.bits, options.block)
    own = config.model_copy(update={"seed": trial.seed, "plan": plan})
    trainer, source, loss_function = prepare_training(own, context, teacher, data)
    student = trainer.model
    for key in keys(trial, options):
        when = AFTER if key == trial.key(AFTER) else BEFORE
        record = {"kind": "trial", "when": when, **trial._asdict()}
        if when == AFTER:
            try:
                for _ in trainer.train(source, loss_function, options.steps):
                    pass
            except DivergedError as error:
                context.progress.log(f"{key}: {error}")
                run.append(key, **record, **dict.fromkeys(ERRORS), layer_errors={})
                continue
            trainer.copy_ema_to(student)
        if run.has(key):
            continue
        found: dict[str, Any] = prediction_errors(student, held_out)
        found["layer_errors"] = layer_errors(student, trial.bits, held_out.batches[:1])
        if when == BEFORE:
            found["inputs"] = input_shapes(teacher, student, held_out.batches[:1])
        run.append(key, **record, **found)


def plan_with(plan: Plan, rotation: str, bits: int, block: int) -> Plan:
    """The plan with a rotation in every rule that quantizes activations, at these bits."""
    table = {"method": rotation, **({"block": block} if rotation == "block-hadamard" else {})}
    method = None if rotation == NONE else read_method("rotation", table)
    rules = []
    for rule in plan.layers:
        if rule.activation is not None:
            changes: dict[str, Any] = {"rotation": method}
            if rule.has_choice("activation"):
                values = rule.activation.model_dump() | {"bits": bits}
                changes["activation"] = type(rule.activation).model_validate(values)
            rule = rule.model_copy(update=changes)
        rules.append(rule)
    return plan.model_copy(update={"layers": tuple(rules)})


@torch.no_grad()
def make_held_out(config: Config, context: Context, teacher: DiT, data: ImageData) -> HeldOut:
    """Batches with noise, timesteps and labels of their own stream, and the teacher's output."""
    options = config.settings_of(Settings)
    source = BatchSource(
        data.model_inputs(torch.arange(len(data))),
        data.labels,
        Diffusion.from_config(config.workload.diffusion),
        teacher,
        batch_size=min(LAYER_IMAGES, options.images),
        seed=0,
        stream="validation",
        device=context.device,
    )
    batches = [source.batch(step) for step in range(options.images // source.batch_size)]
    targets = [teacher(batch.x_t, batch.t, batch.y).float() for batch in batches]
    energy = sum(float(target.square().mean()) for target in targets) / len(targets)
    return HeldOut(batches, targets, energy)


def prediction_errors(student: nn.Module, held_out: HeldOut) -> dict[str, float]:
    """Mean squared differences between predictions, over the mean square of the teacher's.

    Returns:
        error: of quantized activations, between the student with unquantized weights and itself
            with nothing quantized: before training this is the teacher, after it the latent weights
            that training moved. Whatever else the plan quantizes, such as attention, is in both.
        weight_error: between the student with unquantized activations and the teacher.
        student_error: between the student and the teacher.
    """
    rounded = predictions(student, held_out)
    with unquantized(student, weights=False):
        of_weights = predictions(student, held_out)
    with unquantized(student, activations=False):
        of_activations = predictions(student, held_out)
    with unquantized(student):
        exact = predictions(student, held_out)
    pairs = ((of_activations, exact), (of_weights, held_out.targets), (rounded, held_out.targets))
    return {
        name: sum(float((x - y).square().mean()) for x, y in zip(*pair, strict=True))
        / len(held_out.batches)
        / held_out.energy
        for name, pair in zip(ERRORS, pairs, strict=True)
    }


@torch.no_grad()
def predictions(model: nn.Module, held_out: HeldOut) -> list[Tensor]:
    """What a model predicts on the held-out batches, in evaluation mode."""
    with evaluation_mode(model):
        return [model(batch.x_t, batch.t, batch.y).float() for batch in held_out.batches]


@contextmanager
def unquantized(
    student: nn.Module, *, weights: bool = True, activations: bool = True
) -> Iterator[None]:
    """Leave weights or activations of all layers unquantized, for a while."""
    layers = quantized_layers(student).values()
    held = [(layer.weight_quantizer, layer.activation_bits) for layer in layers]
    try:
        for layer in layers:
            if weights:
                layer.weight_quantizer = None
            if activations:
                layer.activation_bits = None
        yield
    finally:
        for layer, (quantizer, bits) in zip(layers, held, strict=True):
            layer.weight_quantizer, layer.activation_bits = quantizer, bits


def layer_errors(student: nn.Module, bits: int, batches: Sequence[Batch]) -> dict[str, float]:
    """By layer type, the mean over layers of ||(Q(a) - a) W||^2 / ||y - E y||^2."""
    names = allocatable_layers(student)
    return _by_type(
        {
            name: sums.varying_error(bits)
            for name, sums in local_errors(student, names, [bits], batches).items()
        }
    )


@torch.no_grad()
def input_shapes(
    teacher: DiT, student: nn.Module, batches: Sequence[Batch]
) -> dict[str, dict[str, float]]:
    """By layer type, how far the teacher's inputs stand out under the student's rotation."""
    layers = quantized_layers(student)
    names = allocatable_layers(student)
    found = {name: Incoherence() for name in names}

    def see(name: str, x: Tensor) -> None:
        found[name].add(rotated_input(layers[name], x))

    with watching(find_layers(teacher, names), see):
        for batch in batches:
            teacher(batch.x_t, batch.t, batch.y)
    return {
        quantity: _by_type({name: getattr(sums, quantity) for name, sums in found.items()})
        for quantity in ("of_tokens", "of_tensor", "kurtosis")
    }


def _by_type(values: dict[str, float]) -> dict[str, float]:
    grouped = defaultdict(list)
    for name, value in values.items():
        grouped[layer_type(name)].append(value)
    return {kind: sum(own) / len(own) for kind, own in grouped.items()}
