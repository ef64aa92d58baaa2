"""Measurements of tokens, kept in a file per subject and timestep until the tables are made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from robuq_bench.checkpointing import load_tensors, save_tensors
from robuq_bench.context import Context
from robuq_bench.errors import UsageError
from robuq_bench.normality.analysis import TokenTable, analyse, draw_errors
from robuq_bench.normality.capture import Captured
from robuq_bench.normality.names import MIN_IMAGES
from robuq_bench.normality.output import Energy, OutputSite
from robuq_bench.normality.statistics import MIN_N
from robuq_bench.normality.summaries import RANDOM, Cell
from robuq_bench.normality.transforms import (
    DRAWN,
    NotApplicable,
    Transform,
    drawn_transforms,
    make_transform,
)
from robuq_bench.quantization.convert import layer_type
from robuq_bench.runs.run import Run

EVERY_TRANSFORM = "every transform"
OUTPUT_ERROR, CENTRING = "output error", "static centring"
_ENERGY = "energy|"
_DETAILS = ("draws", "outputs", "centred")


class Capture(NamedTuple):
    """Activations of one subject at one timestep (-1: the calibration tokens).

    `weights` are those of the subject's layers, [out, n] in the basis of their inputs.
    """

    subject: str
    timestep: int
    layers: Captured
    weights: Mapping[str, Tensor]


class Layers:
    """What tokens of a subject's layers are measured by, made once per layer.

    `probes` are the subject's calibration tokens, or, where `is_calibration` is false, the first
    tokens there are: the dual rotation is fitted to them, and they say the centre if they are
    calibration tokens.
    """

    def __init__(
        self,
        names: Sequence[str],
        seed: int,
        probes: Captured,
        weights: Mapping[str, Tensor],
        is_calibration: bool,
    ) -> None:
        self.names, self.seed, self.probes = names, seed, probes
        self.weights, self.is_calibration = weights, is_calibration
        self._sites: dict[str, OutputSite] = {}
        self._transforms: dict[str, dict[str, Transform | str]] = {}

    def site(self, layer: str) -> OutputSite:
        """Weight and centre of a layer, as far as they are known."""
        if layer not in self._sites:
            has_centre = self.is_calibration and layer in self.probes
            calibration = self.probes[layer].tokens if has_centre else None
            self._sites[layer] = OutputSite.of(self.weights.get(layer), calibration)
        return self._sites[layer]

    def transforms(self, layer: str, width: int) -> dict[str, Transform | str]:
        """Transforms by name for one layer, or why one does not apply."""
        if layer not in self._transforms:
            made: dict[str, Transform | str] = {}
            calibration = self.probes[layer].tokens.float() if layer in self.probes else None
            for name in self.names:
                try:
                    made[name] = make_transform(
                        name, width, layer=layer, seed=self.seed, calibration=calibration
                    )
                except NotApplicable as reason:
                    made[name] = str(reason)
            self._transforms[layer] = made
        return self._transforms[layer]


def measure_tokens(
    capture: Capture, layers: Layers, run: Run, context: Context, sign_draws: int
) -> None:
    """Measure every token of one timestep under every transform; one file, written whole.

    Layers that are too narrow for a test are left out, and listed among what was skipped.
    """
    path = part_path(run, capture.subject, capture.timestep)
    if path.exists():
        return
    label = f"{capture.subject}, timestep {capture.timestep}"
    images = torch.cat([part.images for part in capture.layers.values()]).unique()
    if len(images) < MIN_IMAGES:
        raise UsageError(
            f"{label}: {len(images)} images are too few for an interval; capture at least "
            f"{MIN_IMAGES}"
        )
    tensors: dict[str, Tensor] = {}
    facts = {"subject": capture.subject, "timestep": str(capture.timestep)}
    missing: dict[tuple[str, str, int], list[str]] = {}
    for layer, part in context.progress.track(capture.layers.items(), label):
        width = part.tokens.shape[1]
        place = layer_type(layer), width
        if width < MIN_N or not len(part.tokens):
            missing.setdefault((EVERY_TRANSFORM, *place), []).append(layer)
            continue
        site = layers.site(layer)
        if site.root is None:
            missing.setdefault((OUTPUT_ERROR, *place), []).append(layer)
        elif site.centre is None:
            missing.setdefault((CENTRING, *place), []).append(layer)
        tensors |= Energy.of(part, site).tensors(f"{_ENERGY}{layer}|")
        if site.root is not None:
            facts[f"{_ENERGY}{layer}"] = repr(float(site.root.double().square().sum()))
        for name, transform in layers.transforms(layer, width).items():
            if isinstance(transform, str):
                facts[f"skipped|{name}|{place[0]}|{width}"] = transform
                continue
            table = analyse(part.tokens, part.images, transform, layers.seed, site=site)
            key = f"{name}|{layer}"
            facts[key] = f"{width} {table.n} {' '.join(table.columns)}"
            tensors[key] = torch.from_numpy(table.values).float()
            tensors[f"{key}|images"] = torch.from_numpy(table.images)
            outputs = None if table.outputs is None else table.outputs[:, None]
            if name in DRAWN:
                others = drawn_transforms(
                    name, width, layer=layer, seed=layers.seed, draws=sign_draws
                )[1:]
                # Outputs are judged over draws of signs alone.
                of_draws = draw_errors(part.tokens, others, site if name == RANDOM else None)
                ratios = np.concatenate([table.reference_ratios[:, None], of_draws.ratios], axis=1)
                tensors[f"{key}|draws"] = torch.from_numpy(ratios).float()
                if outputs is not None and of_draws.outputs is not None:
                    outputs = np.concatenate([outputs, of_draws.outputs], axis=1)
            if outputs is not None:
                tensors[f"{key}|outputs"] = torch.from_numpy(outputs)
            if table.centred is not None:
                tensors[f"{key}|centred"] = torch.from_numpy(table.centred)
    why = {
        EVERY_TRANSFORM: f"no tokens of at least {MIN_N} inputs, which a test needs",
        OUTPUT_ERROR: "no shard of the subject brings weights/<layer>",
        CENTRING: "the subject has no calibration tokens (timestep -1), whose mean is the centre",
    }
    for (what, kind, width), names in missing.items():
        facts[f"skipped|{what}|{kind}|{width}"] = f"{', '.join(names)}: {why[what]}"
    save_tensors(path, tensors, facts)


def read_parts(run: Run, transform: str) -> list[Cell]:
    """The measured cells of one transform, read back from the files of `measure_tokens`."""
    cells = []
    for path in _part_files(run):
        tensors, facts = load_tensors(path)
        for name, values in tensors.items():
            kind, _, layer = name.partition("|")
            if kind != transform or "|" in layer:
                continue
            width, n, *columns = facts[name].split(" ")
            images = tensors[f"{name}|images"].numpy()
            table = TokenTable(tuple(columns), values.numpy(), images, int(n))
            more = (tensors.get(f"{name}|{part}") for part in _DETAILS)
            draws, outputs, centred = (None if x is None else x.numpy() for x in more)
            timestep = int(facts["timestep"])
            cells.append(
                Cell(
                    *(facts["subject"], layer, timestep, transform, int(width), table),
                    *(draws, outputs, centred),
                )
            )
    return sorted(cells, key=lambda cell: (cell.subject, cell.layer, cell.timestep))


def read_energies(
    run: Run,
) -> tuple[dict[tuple[str, str, int], Energy], dict[tuple[str, str], float]]:
    """Energies by subject, layer and timestep, and ||W||_F^2 by subject and layer."""
    energies, weights = {}, {}
    for path in _part_files(run):
        tensors, facts = load_tensors(path)
        subject = facts["subject"]
        for name in tensors:
            if name.startswith(_ENERGY) and name.endswith("|images"):
                layer = name.removeprefix(_ENERGY).removesuffix("|images")
                energy = Energy.read(tensors, f"{_ENERGY}{layer}|")
                energies[subject, layer, int(facts["timestep"])] = energy
                if f"{_ENERGY}{layer}" in facts:
                    weights[subject, layer] = float(facts[f"{_ENERGY}{layer}"])
    return energies, weights


def skipped_rows(run: Run) -> list[dict[str, Any]]:
    """Transforms and layers that were left out, and why."""
    found: dict[tuple[str, ...], str] = {}
    for path in _part_files(run):
        for key, reason in load_tensors(path)[1].items():
            if key.startswith("skipped|"):
                found[tuple(key.split("|")[1:])] = reason
    names = ("transform", "layer_type", "width")
    return [{**dict(zip(names, key, strict=True)), "reason": why} for key, why in found.items()]


def _part_files(run: Run) -> list[Path]:
    return sorted((run.checkpoint_folder / "tokens").rglob("*.safetensors"))


def part_path(run: Run, subject: str, timestep: int) -> Path:
    """Where the measurements of one subject and timestep are kept until the tables are made."""
    return run.checkpoint_folder / "tokens" / slug(subject) / f"t{timestep:04d}.safetensors"


def slug(subject: str) -> str:
    """A folder name for a subject."""
    return "".join(c if c.isalnum() or c in "-." else "-" for c in subject)
