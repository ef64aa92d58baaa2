"""Sample grids as data URIs, kept small enough for one file."""

from __future__ import annotations

import base64
import io
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from reports.aggregate import Group
from reports.loading import RunData

BUDGET_BYTES = 900_000
"""All pictures of a report together, before base64 (which adds a third)."""


@dataclass(frozen=True)
class Grid:
    """One sample grid; width and height are in pixels of the original picture."""

    label: str
    note: str
    uri: str
    width: int
    height: int
    anchor: str
    alt: str


def sample_grids(group: Group, budget: int) -> list[Grid]:
    """The teacher's grid and one per plan (its first training seed), same image seeds in all.

    Raises:
        CheckpointError: a picture is damaged.
    """
    found: list[tuple[str, str, RunData, bytes]] = []
    rows = [run for row in group.rows for run in row.runs]
    teacher = _first_picture([*group.teacher.runs, *rows], "samples/grid-teacher.png")
    if teacher is not None:
        found.append(("teacher", "full precision", *teacher))
    for row in group.rows:
        picture = _first_picture(row.runs, "samples/grid-student.png")
        if picture is not None:
            found.append((row.label, f"training seed {picture[0].seed}", *picture))
    share = budget // max(1, len(found))
    return [_grid(label, note, run, data, share) for label, note, run, data in found]


def png_size(data: bytes) -> tuple[int, int]:
    """Width and height in the header of a PNG file."""
    width, height = struct.unpack(">II", data[16:24])
    return width, height


def fit_png(data: bytes, budget: int) -> tuple[bytes, int]:
    """Halve a picture until it takes at most `budget` bytes; returns it and the factor."""
    factor = 1
    while len(data) > budget and min(png_size(data)) > 64:
        with Image.open(io.BytesIO(data)) as picture:
            smaller = picture.convert("RGB").reduce(2)
        buffer = io.BytesIO()
        smaller.save(buffer, format="PNG", optimize=True)
        data, factor = buffer.getvalue(), 2 * factor
    return data, factor


def _first_picture(runs: Sequence[RunData], name: str) -> tuple[RunData, bytes] | None:
    for run in runs:
        data = run.read_png(name)
        if data is not None:
            return run, data
    return None


def _grid(label: str, note: str, run: RunData, data: bytes, budget: int) -> Grid:
    width, height = png_size(data)
    data, factor = fit_png(data, budget)
    if factor > 1:
        note = f"{note}, shown at 1/{factor} of its size"
    return Grid(
        label=label,
        note=note,
        uri="data:image/png;base64," + base64.b64encode(data).decode("ascii"),
        width=width,
        height=height,
        anchor=run.anchor,
        alt=f"Grid of images sampled from {label} ({note}); the same image seeds for every plan",
    )
