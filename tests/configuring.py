"""Configs for tests: the packaged plan a2 on digits, with overrides."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from robuq_bench.config import Config, load_plan, load_workload, resolve

cached_plan, cached_workload = functools.cache(load_plan), functools.cache(load_workload)


def make(overrides: list[str] | None = None, **kwargs: Any) -> Config:
    """A resolved config of a study called toy."""
    arguments = {"study": "toy", "version": "1", "plan": "a2", "workload": "digits"} | kwargs
    return resolve(**arguments, overrides=overrides or [])


def quick(overrides: list[str]) -> Config:
    """`make` for hypothesis: nothing is read from disk."""
    workload = cached_workload("digits")
    teacher = workload.teacher.model_copy(update={"checkpoint": ""})
    parts = {
        "plan": cached_plan("a2"),
        "workload": workload.model_copy(update={"teacher": teacher}),
    }
    return make(overrides, **parts)


def write(path: Path, text: str) -> Path:
    """`path`, holding `text`."""
    path.write_text(text, encoding="utf-8")
    return path
