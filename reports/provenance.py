"""Where every number comes from: a card per run, and the machines that several share."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from reports.loading import LeftOut, RunData
from reports.page import Sheet
from reports.settings import flatten, section
from reports.text import bytes_text
from robuq_bench.runs.lock import status_of

Fact = tuple[str, str]  # what, and its text

_STANDARD_MANIFEST = frozenset(
    {
        *("format", "id", "study", "study_version", "plan", "workload", "seed"),
        *("config_sha256", "inputs", "outputs", "sessions"),
    }
)
_DIGEST = re.compile("[0-9a-f]{64}")
_SHOWN = 16  # digits of a file's digest; the manifest, whose own is printed whole, has all


@dataclass(frozen=True)
class Machine:
    """Hardware and software that several runs share, described once."""

    anchor: str
    name: str
    facts: Sequence[Fact]
    packages: Mapping[str, str]


def machines_of(runs: Sequence[RunData]) -> dict[str, Machine]:
    """The machines of the runs, by what tells them apart."""
    machines: dict[str, Machine] = {}
    for run in runs:
        key = _machine_key(run.provenance)
        if key not in machines:
            index = len(machines) + 1
            machines[key] = Machine(
                anchor=f"machine-{index}",
                name=f"Machine {index}: {hardware(run.provenance)}",
                facts=_machine_facts(run.provenance),
                packages=section(run.provenance, "packages"),
            )
    return machines


def run_cards(runs: Sequence[RunData], machines: Mapping[str, Machine]) -> list[dict[str, Any]]:
    """What the template prints of each run; of further seeds, the facts that the first has not."""
    shown: dict[str, tuple[RunData, list[Fact]]] = {}
    cards = []
    for run in runs:
        card = _run_card(run, machines)
        config = json.dumps({**run.config, "seed": None}, sort_keys=True, default=str)
        names = [name for name, _ in card["facts"]]
        first, facts = shown.setdefault(f"{config} {names}", (run, card["facts"]))
        if first is not run:
            card["facts"] = [fact for fact in card["facts"] if fact not in facts]
        cards.append(card | {"like": None if first is run else first})
    return cards


def _run_card(run: RunData, machines: Mapping[str, Machine]) -> dict[str, Any]:
    manifest, origin = run.manifest, run.provenance
    sessions = manifest["sessions"]
    code = section(origin, "code")
    code_facts = ", ".join(f"{k} {v}" for k, v in code.items() if v is not None)
    settings = {**section(origin, "torch"), **section(origin, "environment")}
    extra = flatten({k: v for k, v in manifest.items() if k not in _STANDARD_MANIFEST})
    digests = {k: {"sha256": v} for k, v in extra.items() if _DIGEST.fullmatch(str(v))}
    facts = [
        ("manifest SHA-256", run.manifest_sha256),
        ("config SHA-256", str(manifest["config_sha256"])),
        ("study version", str(manifest.get("study_version", "not recorded"))),
        ("seed", str(run.seed)),
        ("code", code_facts or "not recorded"),
        ("device", str(origin.get("device", "not recorded"))),
        ("threads", str(origin.get("threads", "not recorded"))),
        ("settings", ", ".join(f"{k}={v}" for k, v in settings.items()) or "none"),
        *((key, str(value)) for key, value in extra.items() if key not in digests),
    ]
    facts += [
        (name, str(entry["note"])) for name, entry in manifest["inputs"].items() if "note" in entry
    ]
    facts += [
        (f"session {i}", f"{s.get('start')} to {s.get('end')}, {s.get('status')}")
        for i, s in enumerate(sessions, start=1)
    ]
    commands = dict.fromkeys(" ".join(map(str, s.get("argv", []))) for s in sessions)
    return {
        "anchor": run.anchor,
        "id": run.id,
        "title": run.title,
        "study": run.study,
        "facts": facts,
        "commands": [command for command in commands if command],
        "config": sorted((k, _setting(v)) for k, v in flatten(run.config).items()),
        "inputs": _digests(manifest["inputs"]),
        "outputs": _digests(manifest["outputs"] | digests),
        "machine": machines[_machine_key(origin)],
    }


def hardware(origin: Mapping[str, Any]) -> str:
    """The device that computed, in words."""
    gpu, cpu = section(origin, "gpu"), section(origin, "cpu")
    if gpu:
        return str(gpu.get("name", "GPU"))
    return str(cpu.get("model", "not recorded"))


def unfinished_sheet(runs: Sequence[RunData]) -> Sheet | None:
    """The runs that are not finished, of which nothing is shown; None without any."""
    rows = []
    for run in runs:
        if not run.finished:
            sessions = run.manifest.get("sessions", [])
            status = status_of(run.path, sessions[-1]) if sessions else "not started"
            torn = ", last line cut off" if run.torn else ""
            rows.append(
                {
                    "run": run.id,
                    "seed": run.seed,
                    "stored items": len(run.records),
                    "state": f"unfinished ({status}{torn})",
                    "anchor": run.anchor,
                }
            )
    if not rows:
        return None
    caption = "Unfinished runs: nothing of theirs is shown as a result"
    return Sheet(pd.DataFrame(rows), caption, anchors="anchor")


def left_out_sheet(left_out: Sequence[LeftOut]) -> Sheet | None:
    """The runs that could not be read, and why; None without any."""
    if not left_out:
        return None
    rows = [{"folder": str(path), "why": reason} for path, reason in left_out]
    return Sheet(pd.DataFrame(rows), "Runs left out: nothing of theirs is in this report")


def _machine_key(origin: Mapping[str, Any]) -> str:
    parts = ("packages", "python", "platform", "cpu", "gpu")
    return json.dumps([origin.get(part) for part in parts], sort_keys=True)


def _machine_facts(origin: Mapping[str, Any]) -> list[Fact]:
    facts = []
    for part in ("cpu", "gpu", "python", "platform"):
        value = origin.get(part)
        if isinstance(value, Mapping):
            facts += [(f"{part} {k.replace('_', ' ')}", _fact(k, v)) for k, v in value.items()]
        else:
            facts.append((part, "none" if value is None else str(value)))
    return facts


def _fact(name: str, value: object) -> str:
    if name.endswith("_bytes") and isinstance(value, int | float):
        return bytes_text(value)
    return "none" if value is None else str(value)


def _digests(entries: Mapping[str, Any]) -> list[Fact]:
    return [(str(name), str(entry["sha256"])[:_SHOWN]) for name, entry in sorted(entries.items())]


def _setting(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
