"""Sample grids as data URIs, kept small enough for one file."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

from PIL import Image as Pillow

from reports.loading import RunData
from reports.page import Image
from reports.protocols import Group

BUDGET_BYTES = 900_000
"""All pictures of a report together, before base64 (which adds a third)."""


def sample_grids(group: Group, budget: int) -> list[Image]:
    """The teacher's grid and one per plan (its first training seed), same image seeds in all.

    Args:
        group: rows whose runs hold grids.
        budget: bytes of all grids together.

    Raises:
        CheckpointError: a picture is damaged.
    """
    wanted = [("teacher", _runs(group), "samples/grid-teacher.png")]
    wanted += [(row.label, list(row.runs), "samples/grid-student.png") for row in group.rows]
    alt = "Grid of images sampled from {}; the same image seeds for every plan"
    return _pictures(wanted, budget, alt)


def nearest_training_images(group: Group, budget: int) -> list[Image]:
    """The teacher's first samples over the training images that are nearest to them.

    Raises:
        CheckpointError: the picture is damaged.
    """
    alt = "Images sampled from {}, below each the nearest training images by pixels and features"
    return _pictures([("teacher", _runs(group), "samples/neighbours-teacher.png")], budget, alt)


def _runs(group: Group) -> list[RunData]:
    return [*group.teacher.runs, *(run for row in group.rows for run in row.runs)]


def _pictures(
    wanted: Sequence[tuple[str, Sequence[RunData], str]], budget: int, alt: str
) -> list[Image]:
    """Of each label the first picture of this name that one of its runs holds."""
    found = {}
    for label, of, name in wanted:
        pictures = ((run, data) for run in of if (data := run.read_png(name)) is not None)
        if first := next(pictures, None):
            found[label] = first
    images = []
    for label, (run, data) in found.items():
        width, height = _size(data)
        data, factor = fit(data, budget // len(found))
        note = f"training seed {run.seed}" if label != "teacher" else "full precision"
        note += f", shown at 1/{factor} of its size" if factor > 1 else ""
        uri = "data:image/png;base64," + base64.b64encode(data).decode("ascii")
        said = alt.format(f"{label} ({note})")
        images.append(Image(label, note, uri, width, height, run.href, said))
    return images


def fit(data: bytes, budget: int) -> tuple[bytes, int]:
    """Halve a picture until it takes at most `budget` bytes; returns it and the factor."""
    factor = 1
    while len(data) > budget and min(_size(data)) > 64:
        buffer = io.BytesIO()
        with Pillow.open(io.BytesIO(data)) as picture:
            picture.convert("RGB").reduce(2).save(buffer, format="PNG", optimize=True)
        data, factor = buffer.getvalue(), 2 * factor
    return data, factor


def _size(data: bytes) -> tuple[int, int]:
    with Pillow.open(io.BytesIO(data)) as picture:
        return picture.size
