"""Is every token's activation normal after a Hadamard transform? The claim RobuQ rests on.

`RULE` was fixed before any activation was seen.

Steps: diffuse real images to evenly spread timesteps; sample tokens at the input of every layer
that the plan quantizes; measure each token under every transform; do the same to tokens whose
distribution is known (a Gaussian null, and controls that are not normal); then the evidence that
needs single tokens: the Berry-Esseen bound against the exact distance, its decay with the width,
projections, and what a test rejects at which n. Nothing is tuned to the outcome: p-values stand
beside their n and the null's share, degenerate tokens are counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from robuq_bench import seeds
from robuq_bench.checkpointing import CheckpointStore, load_tensors, save_tensors
from robuq_bench.config import Config
from robuq_bench.context import Context
from robuq_bench.data.datasets import ImageData, load_dataset
from robuq_bench.diffusion import Diffusion
from robuq_bench.errors import CheckpointError, MissingResourceError, UsageError
from robuq_bench.models.checkpoints import load_teacher
from robuq_bench.normality import evidence, summaries
from robuq_bench.normality.analysis import (
    TokenTable,
    analyse,
    null_table,
    sign_draw_ratios,
)
from robuq_bench.normality.capture import Captured, load_shard, record, save_shard
from robuq_bench.normality.names import MIN_IMAGES, TRANSFORMS
from robuq_bench.normality.statistics import MIN_N
from robuq_bench.normality.transforms import NotApplicable, Transform, make_transform
from robuq_bench.qat import prepare_training
from robuq_bench.quantization.convert import layer_type, quantized_layers, target_layers
from robuq_bench.resumable import resume, train_with_checkpoints
from robuq_bench.runs.digests import walk
from robuq_bench.runs.run import Run
from robuq_bench.statistics.verdicts import verdict_rows
from robuq_bench.students import load_student
from studies.normality.settings import Settings

VERSION = "5"
SUMMARY = "Are activations normal after Hadamard, and what does it cost where they are not?"
RULE = """\
Fixed before any activation was seen, amended once. For a layer type, a transform and b bits, take \
each token's mean squared error under the uniform mid-rise quantizer with RobuQ's steps and its \
mean-absolute-deviation scale, divide it by the token's variance and by the value for N(0, 1) \
(0.3634, 0.1188, 0.03744, 0.01154 at 1 to 4 bits), and average over tokens. "Normal enough for b \
bits" holds if the upper end of the 95 % interval of that mean is below 1.05, does not hold if the \
lower end is at or above 1.05, and is undecided in between. The interval resamples whole images, \
because tokens of one image are not independent; with fewer than 16 nothing is judged. Amended \
after the first run: signs are a draw, and one draw moved proj by more than the interval over \
images, so for the randomised transform the mean also runs over several draws and the interval \
allows for their spread. At 8 bits true Gaussian tokens of width 144 can exceed 1.05 themselves, \
because few values decide the overload: the null beside each verdict says by how much. No verdict \
has a p-value and none is corrected for their number: each is its own at 95 %, and one in 40 can \
be expected to hold or not to hold falsely, at most and if the interval covers as it should."""
CALIBRATION = "calibration"
CALIBRATION_IMAGES = 16
CALIBRATION_TOKENS = 8
PROBE_TOKENS = 512  # at most, per layer
EVERY_TRANSFORM = "every transform"
HEADLINE = ("identity", "randomized-hadamard")


class Capture(NamedTuple):
    """Activations of one subject at one timestep (-1: the calibration tokens)."""

    subject: str
    timestep: int
    layers: Captured


def check(config: Config) -> None:
    """Refuse saved activations that are not here."""
    captured = config.settings_of(Settings).captured
    if captured and not Path(captured).is_dir():
        raise MissingResourceError(
            f"{captured}: no such folder; save activations with "
            "`study normality --set normality.save_activations=true`"
        )


def measure(config: Config, run: Run, context: Context) -> list[dict[str, Any]]:
    """Capture, measure, summarise; returns one line per subject and layer type."""
    options = config.settings_of(Settings)
    transforms = options.transforms or TRANSFORMS
    settings = summaries.Settings(options.alpha, options.bootstrap_draws, config.seed)
    captures = saved_captures(options, run) if options.captured else live(config, run, context)
    probes: dict[str, Captured] = {}
    rotations = Rotations(transforms, config.seed)
    dtypes: set[torch.dtype] = set()
    for capture in captures:
        # A subject's calibration tokens come first, and serve as its examples too.
        if capture.subject not in probes:
            probes[capture.subject] = {
                layer: part.spread(PROBE_TOKENS)
                for layer, part in capture.layers.items()
                if part.tokens.shape[1] >= MIN_N and len(part.tokens)
            }
        dtypes |= {part.tokens.dtype for part in capture.layers.values()}
        if capture.timestep >= 0:
            measure_tokens(
                capture, rotations, probes[capture.subject], run, context, options.sign_draws
            )
    if not probes:
        raise MissingResourceError(f"{options.captured}: holds no shards of activations")
    if not any(probes.values()):
        raise UsageError(f"no captured layer has tokens of {MIN_N} inputs, which a test needs")
    null_dtype = min(dtypes, key=lambda dtype: (dtype.itemsize, str(dtype)))
    nulls: dict[int, TokenTable] = {}
    tables: dict[str, list[dict[str, Any]]] = {
        name: [] for name in ("cells", "types", "errors", "lyapunov")
    }
    # One transform at a time bounds the memory.
    for transform in transforms:
        cells = read_parts(run, transform)
        for n in sorted({cell.table.n for cell in cells} - nulls.keys()):
            nulls[n] = null_table(n, options.control_tokens, null_dtype, config.seed)
        tables["cells"] += summaries.cell_rows(cells, settings)
        tables["types"] += summaries.type_rows(cells, nulls, settings)
        tables["errors"] += summaries.error_rows(cells, nulls, settings)
        tables["lyapunov"] += summaries.lyapunov_rows(cells)
    tables["skipped"] = skipped_rows(run)
    tables["judgements"] = summaries.judgement_rows(tables["errors"], tables["cells"])
    verdicts = summaries.verdicts(tables["types"], tables["judgements"])
    tables["verdicts"] = verdict_rows(verdicts, RULE)
    tables |= evidence.evidence_tables(probes, options, config.seed, context.progress)
    for name, rows in tables.items():
        if rows:
            run.write_table(name, rows)
    table = headline(tables["types"], tables["judgements"])
    for row in table:
        run.append(f"normality/{row['subject']}/{row['layer_type']}", kind="normality", **row)
    return table


def live(config: Config, run: Run, context: Context) -> Iterator[Capture]:
    """Run every subject on the same diffused images; finished timesteps are not run again."""
    options, workload = config.settings_of(Settings), config.workload
    data = load_dataset(workload.data, name=workload.name)
    run.add_input_digest("data", data.sha256, source=data.source)
    wanted = options.images + CALIBRATION_IMAGES
    if len(data) < wanted:
        raise UsageError(
            f"workload {workload.name!r} has {len(data)} images; the study needs "
            f"normality.images + {CALIBRATION_IMAGES} = {wanted}"
        )
    generator = seeds.generator("normality/images", config.seed, 0)
    order = torch.randperm(len(data), generator=generator)[:wanted].tolist()
    diffusion = Diffusion.from_config(workload.diffusion)
    steps = diffusion.num_train_timesteps
    timesteps = [int((i + 0.5) * steps / options.timesteps) for i in range(options.timesteps)]
    for subject, model in subjects(config, run, context, data):
        model.eval()
        layers = list(quantized_layers(model)) or list(target_layers(model, config.plan))
        folder = run.path / "activations" / slug(subject)
        mixed = [int((i + 0.5) * steps / CALIBRATION_IMAGES) for i in range(CALIBRATION_IMAGES)]
        plans = [(-1, order[options.images :], mixed, CALIBRATION_TOKENS)]
        plans += [
            (t, order[: options.images], [t] * options.images, options.tokens_per_image)
            for t in timesteps
        ]
        for timestep, images, ts, per_image in plans:
            if timestep >= 0 and part_path(run, subject, timestep).exists():
                continue
            captured = run_model(
                model, layers, data, diffusion, images, ts, per_image, config, context
            )
            if options.save_activations:
                name = CALIBRATION if timestep < 0 else f"t{timestep:04d}"
                facts = {"subject": subject, "timestep": str(timestep), "model": workload.name}
                save_shard(folder / f"{name}.safetensors", captured, facts)
            yield Capture(subject, timestep, captured)


def subjects(
    config: Config, run: Run, context: Context, data: ImageData
) -> Iterator[tuple[str, nn.Module]]:
    """The models to look at: the teacher or a student, then the plan in the middle of training."""
    options, workload = config.settings_of(Settings), config.workload
    if options.student:
        yield "student", load_student(Path(options.student), workload).to(context.device)
        return
    teacher, digest = load_teacher(workload, context.device)
    run.add_input_digest("teacher", digest)
    yield "teacher", teacher
    if not options.qat_steps:
        return
    trainer, source, loss_function = prepare_training(config, context, teacher, data)
    store = CheckpointStore(run.checkpoint_folder / "training", keep=len(options.qat_steps) + 1)
    for steps in options.qat_steps:
        resume(trainer, store, at_most=steps)
        train_with_checkpoints(
            trainer, source, loss_function, steps, run, store, context, phase="normality"
        )
        yield f"{config.plan.name} after {steps} steps", trainer.model


def run_model(
    model: nn.Module,
    layers: list[str],
    data: ImageData,
    diffusion: Diffusion,
    images: list[int],
    timesteps: list[int],
    tokens_per_image: int,
    config: Config,
    context: Context,
) -> Captured:
    """Sample the layers' inputs while the model predicts the noise of diffused images.

    An image has the same noise at every timestep, so that images stay the only clusters.
    """
    batch_size = config.workload.evaluation.batch_size
    stream = "/".join(map(str, sorted(set(timesteps))))
    with record(model, layers, tokens_per_image, config.seed, stream) as recorder, torch.no_grad():
        for start in range(0, len(images), batch_size):
            index = images[start : start + batch_size]
            x0 = data.model_inputs(torch.tensor(index))
            noise = torch.stack(
                [
                    torch.randn(
                        x0.shape[1:], generator=seeds.generator("normality", config.seed, i)
                    )
                    for i in index
                ]
            )
            t = torch.tensor(timesteps[start : start + batch_size])
            inputs = (diffusion.q_sample(x0, t, noise), t, data.labels[index])
            recorder.images = index
            model(*(part.to(context.device) for part in inputs))
    return recorder.result()


def saved_captures(options: Settings, run: Run) -> Iterator[Capture]:
    """Shards of activations from a folder, calibration first."""
    folder = Path(str(options.captured))
    found: dict[tuple[str, int], Path] = {}
    for path in sorted(path for path in walk(folder) if path.suffix == ".safetensors"):
        run.add_input(path)
        _, metadata = load_shard(path)
        try:
            key = metadata["subject"], int(metadata["timestep"])
        except (KeyError, ValueError):
            raise CheckpointError(
                f"{path}: its metadata must name `subject` and `timestep` (-1: calibration)"
            ) from None
        if key in found:
            raise CheckpointError(f"{path} and {found[key]} are both {key[0]}, timestep {key[1]}")
        found[key] = path
    for (subject, timestep), path in sorted(found.items()):
        yield Capture(subject, timestep, load_shard(path)[0])


class Rotations:
    """The transforms of every layer, made once, because the dual rotation is fitted."""

    def __init__(self, names: Sequence[str], seed: int) -> None:
        self.names, self.seed = names, seed
        self._made: dict[tuple[str, str], dict[str, Transform | str]] = {}

    def of(
        self, subject: str, layer: str, width: int, probes: Captured
    ) -> dict[str, Transform | str]:
        """Transforms by name for one layer, or why one does not apply.

        The dual rotation is fitted on the subject's calibration tokens.
        """
        key = subject, layer
        if key not in self._made:
            self._made[key] = {}
            calibration = probes[layer].tokens.float() if layer in probes else None
            for name in self.names:
                try:
                    self._made[key][name] = make_transform(
                        name, width, layer=layer, seed=self.seed, calibration=calibration
                    )
                except NotApplicable as reason:
                    self._made[key][name] = str(reason)
        return self._made[key]


def measure_tokens(
    capture: Capture,
    rotations: Rotations,
    probes: Captured,
    run: Run,
    context: Context,
    sign_draws: int,
) -> None:
    """Measure every token of one timestep under every transform; one file, written whole.

    Layers that are too narrow for a test are left out, and listed among what was skipped.
    """
    path = part_path(run, capture.subject, capture.timestep)
    if path.exists():
        return
    images = torch.cat([part.images for part in capture.layers.values()]).unique()
    if len(images) < MIN_IMAGES:
        raise UsageError(
            f"{capture.subject}, timestep {capture.timestep}: {len(images)} images are too few "
            f"for an interval; capture at least {MIN_IMAGES}"
        )
    tensors: dict[str, torch.Tensor] = {}
    facts = {"subject": capture.subject, "timestep": str(capture.timestep)}
    narrow: dict[tuple[str, int], list[str]] = {}
    label = f"{capture.subject}, timestep {capture.timestep}"
    for layer, part in context.progress.track(capture.layers.items(), label):
        width = part.tokens.shape[1]
        if width < MIN_N or not len(part.tokens):
            narrow.setdefault((layer_type(layer), width), []).append(layer)
            continue
        for name, transform in rotations.of(capture.subject, layer, width, probes).items():
            if isinstance(transform, str):
                facts[f"skipped|{name}|{layer_type(layer)}|{width}"] = transform
                continue
            table = analyse(part.tokens, part.images, transform, rotations.seed)
            tensors[f"{name}|{layer}"] = torch.from_numpy(table.values).float()
            tensors[f"{name}|{layer}|images"] = torch.from_numpy(table.images)
            if name == "randomized-hadamard":
                draws = sign_draw_ratios(part.tokens, layer, rotations.seed, sign_draws)
                tensors[f"{name}|{layer}|draws"] = torch.from_numpy(draws).float()
            facts[f"{name}|{layer}"] = f"{width} {table.n} {' '.join(table.columns)}"
    for (kind, width), layers in narrow.items():
        facts[f"skipped|{EVERY_TRANSFORM}|{kind}|{width}"] = (
            f"{', '.join(layers)}: no tokens of at least {MIN_N} inputs, which a test needs"
        )
    save_tensors(path, tensors, facts)


def read_parts(run: Run, transform: str) -> list[summaries.Cell]:
    """The measured cells of one transform, read back from the files of `measure`."""
    cells = []
    for path in sorted((run.checkpoint_folder / "tokens").rglob("*.safetensors")):
        tensors, facts = load_tensors(path)
        for name, values in tensors.items():
            kind, _, layer = name.partition("|")
            if kind != transform or layer.endswith(("|images", "|draws")):
                continue
            width, n, *columns = facts[name].split(" ")
            images = tensors[f"{name}|images"].numpy()
            table = TokenTable(tuple(columns), values.numpy(), images, int(n))
            draws = tensors.get(f"{name}|draws")
            cells.append(
                summaries.Cell(
                    facts["subject"],
                    layer,
                    int(facts["timestep"]),
                    transform,
                    int(width),
                    table,
                    None if draws is None else draws.numpy(),
                )
            )
    return sorted(cells, key=lambda cell: (cell.subject, cell.layer, cell.timestep))


def skipped_rows(run: Run) -> list[dict[str, Any]]:
    """Transforms and layers that were left out, and why."""
    found: dict[tuple[str, ...], str] = {}
    for path in sorted((run.checkpoint_folder / "tokens").rglob("*.safetensors")):
        for key, reason in load_tensors(path)[1].items():
            if key.startswith("skipped|"):
                found[tuple(key.split("|")[1:])] = reason
    names = ("transform", "layer_type", "width")
    return [{**dict(zip(names, key, strict=True)), "reason": why} for key, why in found.items()]


def part_path(run: Run, subject: str, timestep: int) -> Path:
    """Where the measurements of one subject and timestep are kept until the tables are made."""
    return run.checkpoint_folder / "tokens" / slug(subject) / f"t{timestep:04d}.safetensors"


def slug(subject: str) -> str:
    """A folder name for a subject."""
    return "".join(c if c.isalnum() or c in "-." else "-" for c in subject)


def headline(types: list[dict[str, Any]], judgements: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Before and after, per subject and layer type, and for which bits it is normal enough."""
    found: dict[tuple[str, str, int], dict[str, Any]] = {}
    for row in types:
        if row["transform"] not in HEADLINE:
            continue
        key = row["subject"], row["layer_type"], row["width"]
        line = found.setdefault(
            key, dict(zip(("subject", "layer_type", "width"), key, strict=True))
        )
        when = "before" if row["transform"] == "identity" else "after"
        for name, column in (("W", "shapiro_w_median"), ("KL", "kl")):
            line[f"{name}_{when}"] = row.get(column)
        own = [
            judgement
            for judgement in judgements
            if all(judgement[k] == row[k] for k in summaries.KEY_FIELDS)
        ]
        for word, column in (("holds", "normal_at_bits"), ("undecided", "undecided_at")):
            bits = [str(judgement["bits"]) for judgement in own if judgement["verdict"] == word]
            line[f"{column}_{when}"] = " ".join(bits) or "none"
    return list(found.values())
