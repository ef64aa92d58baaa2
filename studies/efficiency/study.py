"""What a packed W1.58 DiT saves end to end: file, memory and time, each against a named baseline.

The workload gives the sizes (`--on imagenet256`: DiT-XL/2); weights are random, with open gates.
Baselines: fp32, TF32 and bf16 eager, bf16 compiled, and bf16 compiled in a CUDA graph, which is the
strongest. Peers: torchao int8 where it is installed, and fp8 rowwise where the GPU has it. Ours:
plans a8, a4 and a2-uniform (rank as configured, and all else as it is judged: attention in 8-bit
integers) on the Triton backend in a CUDA graph, as `robuq_bench.cuda_graph` makes it.

One step is one prediction of the network (with guidance: on twice the batch, and the guided
combination). Sampling is deterministic DDIM. Eager and compiled variants are timed by CUDA events
around calls, so their launch overhead counts; the others by graph replays. Each variant and batch
is an item of its own, at least three rounds with their spread; "faster" needs p < .002
(Mann-Whitney) and 5 %. Variants are not interleaved with each other: a variant fills the memory.
A packed model's prediction, of as many images as are timed and with tiles chosen by timing, is
compared with the integer backend (the same arithmetic in plain PyTorch) first; without agreement
it gets no time.

Memory is the peak of the allocator over a step: weights (all parameters and buffers), cuBLAS
workspace (what is freed when its workspaces are cleared) and activations (the rest, a CUDA graph's
private tensors during its capture included). Memory that the allocator holds unused, and the CUDA
context, are left out.

Sizes of files and weights are exact and need no GPU. Without one, GPU time is the end-to-end model
of `robuq_bench.measuring.roofline` for an H100, every value marked as a model, and what was not
measured reads "not run"; the CPU itself is timed as `studies.efficiency.cpu` says. The paper's
factors (15.2x checkpoint, 7.1x GPU memory, 3.5x speed) stand beside ours for every baseline, as it
does not say which one it used.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from robuq_bench.accounting.account import packing_table
from robuq_bench.accounting.layer_costs import plan_costs
from robuq_bench.accounting.structure import dit_structure
from robuq_bench.config import Config, Plan
from robuq_bench.context import Context
from robuq_bench.diffusion import Diffusion
from robuq_bench.errors import CheckError, UsageError
from robuq_bench.inference.graph import cuda_graph
from robuq_bench.measuring.cpu import check_threads
from robuq_bench.measuring.memory import measure_peak, resident_bytes
from robuq_bench.measuring.roofline import Transformer, end_to_end_rows
from robuq_bench.measuring.timing import (
    EagerCalls,
    GraphReplay,
    Stopwatch,
    time_interleaved,
)
from robuq_bench.runs.provenance import cpu_label
from robuq_bench.runs.run import Run
from robuq_bench.statistics.verdicts import verdict_rows
from studies.efficiency.claims import Item, claims, shown
from studies.efficiency.cpu import OnCpu, measure_on_cpu
from studies.efficiency.cpu_tables import cpu_shown
from studies.efficiency.cpu_verdicts import CPU_RULE, cpu_verdicts
from studies.efficiency.settings import Settings
from studies.efficiency.variants import (
    NotRunError,
    Sampler,
    Variant,
    build,
    ddim_coefficients,
    matmul_precision,
    packed_plan,
    release,
    variant_of,
)
from studies.efficiency.verdicts import verdicts

VERSION = "2"
SUMMARY = "File size, GPU memory and speed of the packed model against five baselines."
USES_DATA = False
RULE = (
    "Factors are those that the paper prints for DiT-XL/2. A count of bytes holds where it reaches "
    "the printed factor, for a checkpoint in one file with every part counted. The paper names no "
    "baseline, so memory and speed are judged against each: they hold where the factors of all "
    "packed variants and batches reach the paper's, do not hold where all stay below, and are "
    "undecided otherwise or where a time is unstable; of times, the whole 95 % t interval over "
    "rounds of each has to. What needs a GPU, or is of another model, is not judged. " + CPU_RULE
)
LEGEND = (
    "factor: how many times smaller or faster `ours` is than `against` (of times: of the medians, "
    "both in turns; factor_low and factor_high: 95 % interval over rounds). batch: images of one "
    "prediction of the network. basis: exact counts bytes, measured is of this machine, a modelled "
    "factor is from data sheets. paper: what the paper prints for DiT-XL/2, which --on imagenet256 "
    "is; no other model is to reach it. not run: needs a GPU. All rows are in the run's tables."
)
#: Width and depth of DiT-XL/2, of which the paper speaks.
XL = (1152, 28)
NEEDS_GPU = "a GPU's timings and memory need a CUDA device; sizes are exact, its times a model"
# A round; nine in three rounds is enough for p < .002, which three are not.
SAMPLING_SAMPLES = 3
# Independent outputs differ by 1.4; codes that round the other way at 2 bits stay well below.
MAX_DIFFERENCE = 0.5
PACKED_ROW = 128  # columns that are packed together
# A borrowed GPU may be gone before the last item: ours and the baselines of the claims first, and
# last fp32, whose sampling takes minutes.
ORDER = ("w1.58a8", "bf16-graph", "tf32", "w1.58a4", "w1.58a2", "bf16", "bf16-compile",
         "torchao-int8", "fp8-rowwise", "fp32")  # fmt: skip


def check(config: Config) -> None:
    """Refuse guidance of a model that knows no null label, and threads that this CPU has not."""
    options = config.settings_of(Settings)
    if options.cpu.models and options.hardware == cpu_label():
        check_threads("efficiency.cpu.threads", options.cpu.threads)
    has_null_label = config.workload.model.class_dropout_prob > 0
    if options.guidance and not has_null_label:
        raise UsageError(
            "this workload's model has no null label; --set efficiency.guidance=false times it "
            "without guidance"
        )


def measure(config: Config, run: Run, context: Context) -> list[dict[str, Any]]:
    """Count bytes, measure what this machine can, and set the paper's factors beside it."""
    options = config.settings_of(Settings)
    variants = [variant_of(name) for name in options.variants]
    section = config.workload.model
    packed = [variant for variant in variants if variant.plan]
    plan = packed_plan(packed[0].plan if packed else "a4", options.rank)
    checkpoints = [
        {"basis": "exact", "plan": plan.name, "rank": options.rank, **row}
        for row in packing_table(section, plan)
    ]
    run.write_table("checkpoints", checkpoints)
    weights = weight_rows(config, plan, variants)
    run.write_table("weights", weights)
    tokens = (section.input_size // section.patch_size) ** 2
    transformer = Transformer(section.hidden_size, section.depth, tokens, section.mlp_ratio)
    factor = 2 if options.guidance else 1
    images = [factor * batch for batch in options.batches]
    modelled = end_to_end_rows(transformer, images, rank=options.rank)
    for row, batch in zip(modelled, options.batches, strict=True):
        row["batch"] = batch
    run.write_table("end_to_end_model", modelled)

    on_cpu = OnCpu()
    if context.device.startswith("cuda"):
        items = measure_all(config, variants, run, context)
    else:
        items = []
        context.progress.log(NEEDS_GPU)
        on_cpu = measure_on_cpu(config, run, context)
    if items:
        run.write_table("end_to_end", [columns(item) for item in items])
    rows = claims(options, checkpoints, weights, modelled, items)
    run.write_table("claims", rows)
    is_xl = (section.hidden_size, section.depth) == XL
    if not is_xl:
        context.progress.log(
            f"sizes are those of {config.workload.name}: width {section.hidden_size}, depth "
            f"{section.depth}; the paper's factors are of DiT-XL/2 (width {XL[0]}, depth {XL[1]}), "
            "of which more can be packed: --on imagenet256"
        )
    judged = verdicts(is_xl, checkpoints, rows) + cpu_verdicts(on_cpu.factors, on_cpu.memory)
    run.write_table("verdicts", verdict_rows(judged, RULE))
    # Of the others a failure is a result; with one of ours the run stays open, to be continued.
    ours = {variant.name for variant in packed}
    wrong = [
        item
        for item in items
        if item["variant"] in ours and item["status"].startswith(("check failed", "failed"))
    ] + on_cpu.wrong
    if wrong:
        raise CheckError(
            f"{wrong[0]['variant']}: {wrong[0]['status']}; it has no timing. Tables are in "
            f"{run.path / 'tables'}"
        )
    return cpu_shown(on_cpu.factors) or shown(rows)


def weight_rows(config: Config, plan: Plan, variants: list[Variant]) -> list[dict[str, Any]]:
    """Bytes of parameters and buffers of every variant that are known without running it."""
    section = config.workload.model
    parameters = dit_structure(section, plan).parameters
    rows = []
    for variant in variants:
        size = variant.dtype.itemsize
        if variant.plan:
            count: int | None = packed_bytes(
                section, packed_plan(variant.plan, config_rank(config)), size
            )
        else:
            count = None if variant.peer else size * parameters
        rows.append(
            {
                "basis": "exact",
                "variant": variant.name,
                "description": variant.label,
                "weight_bytes": count,
                "reduction_from_fp32": None if count is None else 4 * parameters / count,
            }
        )
    return rows


def config_rank(config: Config) -> int:
    """Rank of the low-rank branch in this study."""
    return config.settings_of(Settings).rank


def packed_bytes(model_config: Any, plan: Plan, float_bytes: int) -> int:
    """Bytes of a prepared packed model in memory: codes in two bits, scales and sums in four bytes.

    Equal to `weight_bytes` of the model itself, which a test holds it to.
    """
    structure = dit_structure(model_config, plan)
    costs = plan_costs(structure, plan, None).layers
    rest = structure.parameters - sum(c.layer.weights + c.layer.out_features for c in costs)
    total = rest * float_bytes
    for cost in costs:
        layer = cost.layer
        # A sign takes a bit in a file, and a whole number here.
        floats = layer.out_features + cost.branch_values + int(cost.rotation_bits)
        planes = layer.out_features * -(-layer.in_features // PACKED_ROW) * PACKED_ROW // 4
        total += planes + 8 * layer.out_features + floats * float_bytes
    return total


def measure_all(config: Config, variants: list[Variant], run: Run, context: Context) -> list[Item]:
    """Items of every variant, batch and kind ("step", "sampling") that is configured."""
    options = config.settings_of(Settings)
    device_name = torch.cuda.get_device_name(context.device)
    plan = [
        (variant, batch, kind)
        for variant in variants
        for batch in options.batches
        for kind in ("step", "sampling")
        if kind == "step" or batch in options.sampling_batches
    ]

    def key(variant: Variant, batch: int, kind: str) -> str:
        return f"{kind}/{variant.name}/batch{batch}"

    def is_finished(name: str) -> bool:
        record = run.get(name)
        return (
            record is not None
            and record["device_name"] == device_name
            and not record["status"].startswith(("check failed", "failed"))
        )

    missing = [item for item in plan if not is_finished(key(*item))]
    with context.progress.task("efficiency", len(plan), len(plan) - len(missing)) as task:
        for variant in sorted(variants, key=lambda v: ORDER.index(v.name)):
            wanted = [(batch, kind) for v, batch, kind in missing if v == variant]
            if not wanted:
                continue
            bench = Bench(config, variant, context.device)
            try:
                for batch, kind in wanted:
                    found = bench.measure(batch, kind)
                    run.append(
                        key(variant, batch, kind),
                        kind=f"efficiency-{kind}",
                        device_name=device_name,
                        variant=variant.name,
                        description=variant.label,
                        batch=batch,
                        measured=kind,
                        **found,
                    )
                    task.advance()
            finally:
                bench.close()
    items = [run.get(key(*item)) for item in plan]
    return [item for item in items if item is not None]


def columns(item: Item) -> dict[str, Any]:
    """The row of a table: an item without its bookkeeping and raw samples."""
    return {k: v for k, v in item.items() if k not in ("key", "kind", "rounds_s")}


class Bench:
    """One variant on the device; its model is built when the first item asks for it."""

    def __init__(self, config: Config, variant: Variant, device: str) -> None:
        self.config, self.options, self.variant = config, config.settings_of(Settings), variant
        self.device, self.section = device, config.workload.model
        self.model: nn.Module | None = None
        self.resident_before = 0
        self.expected: dict[int, Tensor] = {}
        self.prepared: tuple[int, Sampler, Callable[[], Tensor], float | None] | None = None

    def measure(self, batch: int, kind: str) -> dict[str, Any]:
        """Columns of one item; `status` says why there are no numbers where there are none."""
        facts = {
            "images": batch * (2 if self.options.guidance else 1),
            "guidance": self.options.guidance,
            "steps": 1 if kind == "step" else self.options.sampling_steps,
            "weights": "random",
        }
        try:
            with torch.no_grad(), matmul_precision(self.variant.tf32):
                sampler, predict, difference = self._prepare(batch)
                if difference is not None and not difference <= MAX_DIFFERENCE:
                    return facts | {
                        "status": "check failed: the prediction differs from the integer "
                        f"backend's by {difference:.2g} of its size"
                    }
                measure = self._step if kind == "step" else self._sampling
                measured = measure(sampler, predict)
        except NotRunError as error:
            return facts | {"status": str(error)}
        except Exception as error:  # one variant that fails must not take the others along
            lines = str(error).strip().splitlines()
            text = lines[0] if lines else ""
            return facts | {"status": f"failed: {type(error).__name__}: {text}"}
        return facts | {"status": "ok", "difference_to_integer": difference} | measured

    def close(self) -> None:
        """Release the model."""
        self.model = self.prepared = None
        release()

    def _prepare(self, batch: int) -> tuple[Sampler, Callable[[], Tensor], float | None]:
        """Inputs, predictor and the packed model's difference: one compilation for both kinds."""
        if self.prepared is None or self.prepared[0] != batch:
            self.prepared = None
            model = self._model()
            difference = self._difference(model, batch)
            sampler = self._sampler(model, batch, self.options.guidance)
            self.prepared = batch, sampler, self._predictor(sampler), difference
        return self.prepared[1:]

    def _model(self) -> nn.Module:
        """The model, built when it is first asked for, after the integer backend's predictions."""
        if self.model is None:
            release()
            if self.variant.plan:
                exact = self._build("integer")
                self.expected = {b: self._predict(exact, b) for b in self.options.batches}
                del exact
                release()
            self.resident_before = resident_bytes()
            self.model = self._build("triton")
        return self.model

    def _difference(self, model: nn.Module, batch: int) -> float | None:
        """RMS difference from the integer backend over the RMS; None for full precision."""
        if not self.variant.plan:
            return None
        from kernels.ternary_matmul.triton import tuning

        with tuning():
            found = self._predict(model, batch)
        error = (found - self.expected[batch]).square().mean().sqrt()
        difference = float(error / self.expected[batch].square().mean().sqrt())
        # JSON has neither NaN nor infinity; this fails just as they do.
        return difference if difference < 1e6 else 1e6

    def _predict(self, model: nn.Module, batch: int) -> Tensor:
        """Float32 prediction of as many images as a step of `batch` has, none of them guided."""
        images = batch * (2 if self.options.guidance else 1)
        return self._sampler(model, images, False).predict().float()

    def _sampler(self, model: nn.Module, batch: int, guided: bool) -> Sampler:
        dtype, seed = self.variant.dtype, self.config.seed
        return Sampler(model, self.section, dtype, batch, guided, self.device, seed)

    def _build(self, backend: str) -> nn.Module:
        return build(
            self.variant, self.section, self.options.rank, self.config.seed, self.device, backend
        )

    def _predictor(self, sampler: Sampler) -> Callable[[], Tensor]:
        if not self.variant.compiled:
            return sampler.predict
        torch._dynamo.reset()
        compiled: Callable[[], Tensor] = torch.compile(sampler.predict, dynamic=False)
        return compiled

    def _time(self, watch: Stopwatch, min_samples: int, round_s: float) -> dict[str, Any]:
        times = time_interleaved(
            {"it": watch}, rounds=self.options.rounds, round_s=round_s, min_samples=min_samples
        )
        return {**times["it"].summary("ms"), "rounds_s": [list(r) for r in times["it"].rounds_s]}

    def _step(self, sampler: Sampler, predict: Callable[[], Tensor]) -> dict[str, Any]:
        watch: Stopwatch
        watch = GraphReplay([predict]) if self.variant.graph else EagerCalls([predict])
        row = self._time(watch, 5, self.options.round_ms * 1e-3)
        del watch
        graphs: list[Any] = []

        def once() -> None:
            graphs.clear()
            graphs.append(cuda_graph(predict) if self.variant.graph else predict())

        memory = measure_peak(once, sampler.model, self.resident_before)
        graphs.clear()
        return row | memory

    def _sampling(self, sampler: Sampler, predict: Callable[[], Tensor]) -> dict[str, Any]:
        diffusion = Diffusion.from_config(self.config.workload.diffusion)
        tables = ddim_coefficients(diffusion, self.options.sampling_steps)
        timesteps, coefficients = (table.to(self.device) for table in tables)

        step: Callable[[], Any] = partial(sampler.step, predict)
        if self.variant.graph:
            step = cuda_graph(step)
        watch = EagerCalls([lambda: sampler.sample(step, timesteps, coefficients)], warmup=1)
        row = self._time(watch, SAMPLING_SAMPLES, 0.0)
        if self.variant.graph:
            row["method"] = f"CUDA events around {len(timesteps)} graph replays"
        row["images_per_s"] = len(sampler.x) / (row["median_ms"] * 1e-3)
        return row
