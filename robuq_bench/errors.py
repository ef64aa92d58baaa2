"""Errors that a user can act on. Each message names the culprit and the way out."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RobuqError(Exception):
    """Base of every error the suite raises on purpose; `exit_code` is what the CLI returns."""

    exit_code = 1


class DivergedError(RobuqError):
    """A loss or a gradient stopped being finite; the message names the step."""


class UsageError(RobuqError):
    """The request cannot be carried out as written (exit 2)."""

    exit_code = 2


class ConfigError(UsageError):
    """A plan, workload or `--set` override is invalid; the message names file and key (exit 2)."""


class CheckError(RobuqError):
    """Work finished, but a declared check failed (exit 3)."""

    exit_code = 3


class MissingResourceError(RobuqError):
    """Hardware or data that the request needs is not here (exit 4)."""

    exit_code = 4


class CheckpointError(MissingResourceError):
    """A stored file is missing, damaged or not trusted; the message names it (exit 4)."""


def suggest(name: str, options: Iterable[str]) -> str:
    """Return a message suffix with the nearest valid name, or the list of valid ones."""
    known = sorted(options)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(known)}" if known else ""
