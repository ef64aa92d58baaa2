"""Pictures that were drawn before, kept by content: see `drawn_once`."""

from __future__ import annotations

import json
import logging
import pickle
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from functools import wraps
from typing import ParamSpec

import pandas as pd

from robuq_bench.errors import RobuqError
from robuq_bench.figures import Picture, heat, panel
from robuq_bench.files import cache_folder, sha256_bytes
from robuq_bench.kept import code_digest, keep, read_kept, warn_once

P = ParamSpec("P")

_FIELDS = {field.name for field in fields(Picture)}

logger = logging.getLogger(__name__)


def drawn_once(draw: Callable[P, Picture]) -> Callable[P, Picture]:
    """Let a function draw each picture once, and read it from `cache_folder()` from then on.

    The picture has to follow from the arguments alone, plain data that pickle can write: tables,
    texts, numbers. It is drawn anew where these change, or the source of the function's package or
    of this one, or anything installed; and, with a warning, where the cache folder is of no use.
    """

    @wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> Picture:
        root = cache_folder()
        if root is None:
            return draw(*args, **kwargs)
        try:
            code = code_digest(draw.__module__.partition(".")[0])
        except (RobuqError, OSError, UnicodeDecodeError) as error:
            warn_once(f"no picture is kept, as what draws it cannot be identified ({error})")
            return draw(*args, **kwargs)
        content = pickle.dumps((code, draw.__module__, draw.__qualname__, args, kwargs))
        path = root / "figures" / f"{sha256_bytes(content)}.json"
        kept = read_kept(path)
        if kept is not None and (picture := _as_picture(kept)):
            return picture
        if kept is not None:
            logger.warning("%s holds no picture; drawing it anew", path)
        picture = draw(*args, **kwargs)
        keep(path, json.dumps(asdict(picture)))
        return picture

    return drawn


def _as_picture(text: str) -> Picture | None:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    is_one = isinstance(found, dict) and found.keys() == _FIELDS
    is_one = is_one and all(isinstance(value, str) for value in found.values())
    return Picture(**found) if is_one else None


@drawn_once
def heat_panel(
    name: str, alt: str, title: str, frame: pd.DataFrame, edges: Sequence[float], label: str,
    texts: pd.DataFrame | bool, x: str = "",
) -> Picture:  # fmt: skip
    """A heat map as a panel of its own; `x` labels its columns."""
    with panel(name, alt, height=1.25 + 0.22 * len(frame), title=title) as drawn:
        heat(frame, drawn.axes, edges, label, texts=texts)
        drawn.axes.set(xlabel=x, ylabel="")
    return drawn.picture
