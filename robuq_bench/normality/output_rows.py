"""Tables of output errors and constant energy, by layer, layer type and timestep; see `output`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from robuq_bench.normality.consequence import BITS
from robuq_bench.normality.intervals import (
    MIN_CLUSTERS,
    MeanInterval,
    cluster_ratios,
    interval_of,
    with_draws,
)
from robuq_bench.normality.output import Energy, normal_errors
from robuq_bench.normality.summaries import (
    Cell,
    Row,
    Settings,
    block_of,
    draw_range,
    grouped,
    key_fields,
)
from robuq_bench.normality.transforms import matrix_name
from robuq_bench.quantization.convert import layer_type

TABLES = ("output", "output_layers", "output_timesteps")
Floats = NDArray[np.float64]
LayerKey = tuple[str, str]
"""Subject and layer."""
Energies = Mapping[tuple[str, str, int], Energy]
"""By subject, layer and timestep."""


class LayerEnergy(NamedTuple):
    """Energies of a layer's tokens by timestep and image, [timesteps, images of the subject].

    `total` of x, `varying` of x - m and `signal` of W (x - m), zero where no weight is known.
    """

    timesteps: tuple[int, ...]
    images: tuple[int, ...]
    width: int
    tokens: int
    total: Floats
    varying: Floats
    signal: Floats


class _Errors(NamedTuple):
    """Output errors of a layer under one transform: [draws, bits, timesteps, images]."""

    quantized: Floats
    centred: Floats | None
    energy: LayerEnergy
    normal: Floats
    """||W||_F^2 / n sum ||x - m||^2, the output energy of white tokens: [timesteps, images]."""

    def at(self, timestep: int | None) -> _Errors:
        """Summed over timesteps, whose axis goes; or of one of them."""
        index = slice(None)
        if timestep is not None:
            place = self.energy.timesteps.index(timestep)
            index = slice(place, place + 1)
        energy = self.energy._replace(signal=self.energy.signal[index].sum(0))
        centred = None if self.centred is None else self.centred[..., index, :].sum(-2)
        return _Errors(
            self.quantized[..., index, :].sum(-2), centred, energy, self.normal[index].sum(0)
        )


def layer_energies(energies: Energies) -> dict[LayerKey, LayerEnergy]:
    """Energies about the mean m over all timesteps and images of every layer."""
    images: dict[str, set[int]] = {}
    parts: dict[LayerKey, dict[int, Energy]] = {}
    for (subject, layer, timestep), energy in energies.items():
        images.setdefault(subject, set()).update(energy.images.tolist())
        parts.setdefault((subject, layer), {})[timestep] = energy
    found = {}
    for (subject, layer), by_timestep in sorted(parts.items()):
        everyone = tuple(sorted(images[subject]))
        own = list(by_timestep.values())
        tokens = sum(int(part.counts.sum()) for part in own)
        if not tokens:
            continue
        mean = np.sum([part.sums.sum(0) for part in own], axis=0) / tokens
        output_mean = np.sum([part.output_sums.sum(0) for part in own], axis=0) / tokens
        total, varying, signal = (
            np.stack(
                [_by_image(v, part.images, everyone) for part, v in zip(own, values, strict=True)]
            )
            for values in (
                [part.squares for part in own],
                [part.about(mean) for part in own],
                [part.output_about(output_mean) for part in own],
            )
        )
        found[subject, layer] = LayerEnergy(
            tuple(by_timestep), everyone, len(mean), tokens, total, varying, signal
        )
    return found


def constant_rows(layers: Mapping[LayerKey, LayerEnergy], settings: Settings) -> list[Row]:
    """Share of a layer's energy that is one constant vector; one row per layer, then per type.

    The plug-in estimate ||m||^2 / mean ||x||^2: high by at most (1 - share) / images.
    """
    rows = []
    types: dict[tuple[str, str, int], list[LayerEnergy]] = {}
    for (subject, layer), energy in layers.items():
        kind = layer_type(layer)
        types.setdefault((subject, kind, energy.width), []).append(energy)
        key = {"subject": subject, "layer": layer, "layer_type": kind, "block": block_of(layer)}
        rows.append(key | {"width": energy.width} | _share_fields([energy], settings))
    for (subject, kind, width), own in types.items():
        key = {"subject": subject, "layer": None, "layer_type": kind, "block": None}
        rows.append(key | {"width": width} | _share_fields(own, settings))
    return rows


def _share_fields(layers: Sequence[LayerEnergy], settings: Settings) -> Row:
    row: Row = {
        "layers": len(layers),
        "tokens": sum(layer.tokens for layer in layers),
        "images": len(layers[0].images),
    }
    if row["images"] < MIN_CLUSTERS:
        return row
    varying = np.stack([layer.varying.sum(0) for layer in layers])
    total = np.stack([layer.total.sum(0) for layer in layers])
    drawn = 1 - cluster_ratios(varying, total, settings.draws, settings.seed).mean(1)
    if np.isfinite(drawn).all():
        row |= dict(zip(("share", "share_low", "share_high"), interval_of(drawn), strict=True))
    return row


def output_rows(
    cells: Sequence[Cell],
    layers: Mapping[LayerKey, LayerEnergy],
    weights: Mapping[LayerKey, float],
    settings: Settings,
    dtype: torch.dtype = torch.float32,
) -> dict[str, list[Row]]:
    """Output errors of one transform's cells: tables by layer, layer type, and its timesteps.

    Args:
        cells: those without output errors are passed over.
        layers: of `layer_energies`.
        weights: ||W||_F^2 of every layer.
        settings: of the bootstrap.
        dtype: to which normal tokens are rounded.
    """
    tables: dict[str, list[Row]] = {name: [] for name in TABLES}
    for key, group in grouped([cell for cell in cells if cell.outputs is not None]).items():
        by_layer: dict[str, list[Cell]] = {}
        for cell in group:
            by_layer.setdefault(cell.layer, []).append(cell)
        errors = {}
        for layer, own in by_layer.items():
            place = key[0], layer
            errors[layer] = _errors_of(own, layers[place], weights[place])
        v = normal_errors(key[2], dtype, settings.seed)
        common = {**key_fields(key), "matrix": matrix_name(key[3], key[2])}
        for layer, own_errors in errors.items():
            place_fields = {**common, "layer": layer, "block": block_of(layer)}
            tables["output_layers"] += _rows(place_fields, [own_errors.at(None)], v, settings)
        whole = [own_errors.at(None) for own_errors in errors.values()]
        tables["output"] += _rows(common, whole, v, settings)
        for timestep in sorted({t for e in errors.values() for t in e.energy.timesteps}):
            at = [e.at(timestep) for e in errors.values() if timestep in e.energy.timesteps]
            fields = {**common, "timestep": timestep}
            tables["output_timesteps"] += _rows(fields, at, v, settings)
    return tables


def _errors_of(cells: Sequence[Cell], energy: LayerEnergy, weight: float) -> _Errors:
    by_timestep = {cell.timestep: cell for cell in cells}
    quantized, centred = [], []
    for timestep in energy.timesteps:
        cell = by_timestep[timestep]
        assert cell.outputs is not None
        finite = np.isfinite(cell.outputs).all((1, 2))
        images = cell.table.images[finite]
        quantized.append(_by_image(cell.outputs[finite], images, energy.images))
        if cell.centred is not None:
            centred.append(_by_image(cell.centred[finite], images, energy.images))
    return _Errors(
        np.moveaxis(np.stack(quantized), (0, 1, 2, 3), (2, 3, 0, 1)),
        np.moveaxis(np.stack(centred), (0, 1, 2), (1, 2, 0)) if centred else None,
        energy,
        energy.varying * weight / energy.width,
    )


def _by_image(values: Floats, images: NDArray[np.int64], everyone: Sequence[int]) -> Floats:
    """Sums of rows [T, ...] over each of the images `everyone`, given the image of every row."""
    total = np.zeros((len(everyone), *values.shape[1:]))
    np.add.at(total, np.searchsorted(np.asarray(everyone), images), values)
    return total


def _rows(key: Row, layers: Sequence[_Errors], v: Floats, settings: Settings) -> list[Row]:
    """A row per bit width: means over layers of their ratios of sums, with intervals."""
    images = len(layers[0].energy.images)
    rows = [{**key, "bits": bits, "layers": len(layers), "images": images} for bits in BITS]
    if images < MIN_CLUSTERS:
        return rows

    def means(numerators: Sequence[Floats], denominators: Sequence[Floats]) -> Floats:
        ratios = cluster_ratios(
            np.stack(numerators), _like(denominators, numerators[0]), settings.draws, settings.seed
        )
        return ratios.mean(1)

    signal, normal = [e.energy.signal for e in layers], [e.normal for e in layers]
    drawn = [e.quantized for e in layers]
    errors, ratios = means(drawn, signal), means(drawn, normal) / v  # [1 + resamples, draws, bits]
    if not (np.isfinite(errors).all() and np.isfinite(ratios).all()):
        return rows
    error, ratio = (interval_of(part.mean(1)) for part in (errors, ratios))
    draws = ratios.shape[1]
    if draws > 1:
        error, ratio = with_draws(error, errors[0]), with_draws(ratio, ratios[0])
    normal_error = v * means(normal, signal)[0]
    centred = [e.centred for e in layers if e.centred is not None]
    gain = None
    if len(centred) == len(layers):
        of_centred = means(centred, signal)
        gain = interval_of(errors[:, 0] / of_centred)
        centred_ratio = means(centred, normal)[0] / v
    for index, row in enumerate(rows):
        row |= _named(("error", "error_low", "error_high"), error, index)
        row["normal_error"] = float(normal_error[index])
        row |= _named(("ratio", "low", "high"), ratio, index)
        if draws > 1:
            row |= draw_range(key["transform"], ratios[0, :, index])
        if gain is not None:
            row["centred_error"] = float(of_centred[0, index])
            row["centred_ratio"] = float(centred_ratio[index])
            row |= _named(("centring_gain", "gain_low", "gain_high"), gain, index)
    return rows


def _like(denominators: Sequence[Floats], numerator: Floats) -> Floats:
    """Denominators [layers, images] with the axes of numerators between: [layers, ..., images]."""
    stacked = np.stack(denominators)
    between = numerator.ndim - 1
    return stacked.reshape(len(stacked), *(1,) * between, stacked.shape[-1])


def _named(names: Sequence[str], interval: MeanInterval, index: int) -> Row:
    return {name: float(part[index]) for name, part in zip(names, interval, strict=True)}
