"""What git knows of a file of claims: its last commit, and what it said at others."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from robuq_bench.claims.declared import Declared, parse_claims
from robuq_bench.errors import ConfigError

BEFORE = "before its runs"
CHANGED = "changed after"
UNKNOWN = "unknown"


def last_commit(path: Path) -> str:
    """The commit that last changed a file, with "+changes" where it was changed since.

    "" outside of git, and for a file that no commit holds.
    """
    commit = _git(path, "log", "-1", "--format=%H", "--", path.name)
    if not commit:
        return ""
    return commit.strip() + ("+changes" if _git(path, "status", "-s", "--", path.name) else "")


@cache
def claims_at(path: Path, commit: str) -> Declared | None:
    """What the file of claims said at a commit; None where git cannot tell.

    Nor can it where today's schema, plans and workloads do not read what was there.
    """
    text = _git(path, "show", f"{commit}:./{path.name}")
    if text is None:
        known = _git(path, "cat-file", "-t", commit)
        return None if known is None else Declared()  # a commit from before the file
    try:
        return parse_claims(text, f"{path} at {commit[:12]}")
    except ConfigError:
        return None


def declared_before(
    declared: Declared,
    key: str,
    commits: Iterable[str],
    path: Path,
    place: tuple[str, int | None] | None = None,
) -> str:
    """Whether the file held this very claim at the commit of each run; "" without runs.

    Args:
        declared: what the file says now.
        key: of the claim.
        commits: of the runs' code, "" where it is not known.
        path: the file.
        place: workload and budget that it was made on; None for verdicts of studies.
    """
    words, on = set(), "" if place is None else place[0]
    for commit in commits:
        then = claims_at(path, commit) if commit else None
        if then is None:
            words.add(UNKNOWN)
        elif then.says(key, place) and then.digest(key, on) == declared.digest(key, on):
            words.add(BEFORE)
        else:
            words.add(CHANGED)
    return next((word for word in (CHANGED, UNKNOWN, BEFORE) if word in words), "")


def _git(path: Path, *arguments: str) -> str | None:
    """What git answers in the file's folder; None where it fails."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    command = ["git", "-C", str(path.resolve().parent), *arguments]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=True, timeout=20
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout
