"""`build_report`: from run folders to one HTML file and its tables.

The same runs give the same bytes: inputs are sorted, no clock is read, and every time shown comes
from a manifest.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from reports import tables
from reports.aggregate import Group, group_runs
from reports.allocation import allocation_runs
from reports.allocation.story import RULE as ALLOCATION_RULE
from reports.allocation.story import allocation_claims
from reports.allocation.story import answer as allocation_answer
from reports.claims import Claim, group_claims, open_claims
from reports.efficiency import efficiency_runs
from reports.efficiency.story import RULE as EFFICIENCY_RULE
from reports.efficiency.story import answer as efficiency_answer
from reports.efficiency.story import efficiency_claims
from reports.efficiency.tables import factor_table
from reports.export import write_normality, write_run_table, write_tables, write_tex
from reports.kernels import kernel_runs
from reports.kernels.story import RULE as KERNEL_RULE
from reports.kernels.story import answer as kernel_answer
from reports.kernels.story import kernel_claims
from reports.kernels.tables import target_table
from reports.loading import LeftOut, RunData, find_runs, leave_out
from reports.normality.claims import RULE, normality_claims
from reports.normality.data import NormalityRun, normality_runs
from reports.normality.story import answer
from reports.sections import build_sections
from reports.sensitivity import sensitivity_runs
from reports.sensitivity.story import RULE as SENSITIVITY_RULE
from reports.sensitivity.story import answer as sensitivity_answer
from reports.sensitivity.story import sensitivity_claims
from reports.settings import flatten, section
from reports.story import plain_words
from reports.study_tables import StudyRun
from reports.text import NOT_RUN, Phrase, bytes_text, plural
from robuq_bench.errors import CheckpointError, UsageError
from robuq_bench.files import atomic_write_text
from robuq_bench.runs.run_files import MANIFEST

_STANDARD_MANIFEST = frozenset(
    {
        *("format", "id", "study", "study_version", "plan", "workload", "seed"),
        *("config_sha256", "inputs", "outputs", "sessions"),
    }
)


_STUDY_RULES = {
    "sensitivity": SENSITIVITY_RULE,
    "allocation": ALLOCATION_RULE,
    "kernels": KERNEL_RULE,
    "efficiency": EFFICIENCY_RULE,
}


@dataclass(frozen=True)
class Machine:
    """Hardware and software that several runs share, described once."""

    anchor: str
    name: str
    facts: Sequence[tuple[str, str]]
    packages: Mapping[str, str]


def build_report(run_paths: Sequence[Path], output: Path) -> Path:
    """Write the report of the given runs to `output`, its tables beside it; return `output`.

    Args:
        run_paths: run folders, or folders that hold runs at some depth. Finished runs are shown;
            unfinished ones are only listed as such.
        output: the HTML file. `<stem>-*.csv` and `<stem>-summary.tex` are written beside it.

    A run that is damaged, or whose records are not what its study writes, is left out: a warning
    and the report name it.

    Raises:
        UsageError: no runs, a path that does not exist, or an output that is a folder.
        CheckpointError: no run is sound; names the files.
        RobuqError: the output cannot be written.
    """
    if output.is_dir():
        raise UsageError(f"{output} is a folder; name a file, for example {output / 'report.html'}")
    runs, left_out = find_runs(run_paths)
    if runs:
        try:
            _write(runs, left_out, output)
            return output
        except _UNREADABLE:
            unreadable = _unreadable(runs)
            if not unreadable:
                raise
        left_out += [leave_out(run.path, error) for run, error in unreadable]
        runs = [run for run in runs if all(run is not bad for bad, _ in unreadable)]
    if not runs:
        raise CheckpointError(f"no run is sound: {'; '.join(reason for _, reason in left_out)}")
    _write(runs, left_out, output)
    return output


# What reading records of another kind than expected raises; CheckpointError is a damaged file.
_UNREADABLE = (CheckpointError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


def _unreadable(runs: Sequence[RunData]) -> list[tuple[RunData, Exception]]:
    """The runs of which no report can be made even alone, each with what stopped it."""
    found: list[tuple[RunData, Exception]] = []
    with tempfile.TemporaryDirectory() as folder:
        for run in runs:
            try:
                _write([run], [], Path(folder) / "report.html")
            except _UNREADABLE as error:
                found.append((run, error))
    return found


def _write(runs: Sequence[RunData], left_out: Sequence[LeftOut], output: Path) -> None:
    """Write the report of these runs and its tables."""
    finished = [run for run in runs if run.finished]
    groups = group_runs(runs)
    claims = [(group, group_claims(group)) for group in groups]
    normality = normality_runs(finished)
    normal = [(study, normality_claims(study)) for study in normality]
    sensitive, allocated = sensitivity_runs(finished), allocation_runs(finished)
    measured = [("Sensitivity", study, sensitivity_claims(study)) for study in sensitive]
    measured += [("Worth of AMPN", study, allocation_claims(study)) for study in allocated]
    kernels, efficient = kernel_runs(finished), efficiency_runs(finished)
    measured += [("Efficiency", study, efficiency_claims(study)) for study in efficient]
    measured += [("Kernels", study, kernel_claims(study)) for study in kernels]
    # A shard has no tables, so it answers nothing.
    unanswered = {"sensitivity"} if not sensitive else set()
    unclaimed = open_claims({run.study for run in finished} - unanswered)
    machines = _machines(finished)
    page = (
        _environment()
        .get_template("report.html")
        .render(
            question=_question(groups, normality, sensitive or allocated, kernels or efficient),
            stories=_stories(runs, groups, normality, [*sensitive, *allocated], kernels, efficient),
            claims=[_judged(*item, is_main=i == 0) for i, item in enumerate(claims)],
            normality_claims=[_judged_normality(*item) for item in normal],
            study_claims=[_judged_study(*item) for item in measured],
            open_claims=tables.claims_table(unclaimed, "Claims that need other studies"),
            sections=build_sections(runs),
            unfinished=tables.unfinished_table(runs),
            left_out=tables.left_out_table(left_out),
            runs=[_run_card(run, machines) for run in finished],
            machines=list(machines.values()),
            count=_count(runs, left_out),
        )
    )
    page = "\n".join(line.rstrip() for line in page.splitlines() if line.strip()) + "\n"
    listed = [(group.title, claim) for group, found in claims for claim in found]
    listed += [(study.title, claim) for study, found in normal for claim in found]
    listed += [(study.title, claim) for _, study, found in measured for claim in found]
    write_tables(output, groups, finished, [*listed, *(("other studies", c) for c in unclaimed)])
    write_normality(output, normality)
    write_run_table(output, "sensitivity", "agreement", sensitive)
    write_run_table(output, "allocation", "candidates", allocated)
    for name in ("kernels", "kernel_checks", "roofline"):
        write_run_table(output, "kernels", name, [s for s in kernels if s.tables.get(name)])
    write_tex(output, "kernels", [target_table(study) for study in kernels])
    for name in ("claims", "checkpoints", "weights", "end_to_end", "end_to_end_model"):
        write_run_table(output, "efficiency", name, [s for s in efficient if s.tables.get(name)])
    write_tex(output, "efficiency", [factor_table(study) for study in efficient])
    atomic_write_text(output, page)  # last: there is no page whose tables could not be made


def _judged(group: Group, claims: Sequence[Claim], *, is_main: bool) -> tables.Table:
    """The checklist; of a further protocol only the claims that its runs can judge."""
    shown = [claim for claim in claims if is_main or claim.verdict != NOT_RUN]
    table = tables.claims_table(shown, f"Claims of the paper, judged on {group.title}")
    if len(shown) < len(claims):
        table.note = f"{plural(len(claims) - len(shown), 'other claim')}: not run on {group.title}."
    return table


def _judged_normality(study: NormalityRun, claims: Sequence[Claim]) -> tables.Table:
    table = tables.claims_table(claims, f"Normality of activations, judged on {study.title}")
    table.note = RULE
    return table


def _judged_study(about: str, study: StudyRun, claims: Sequence[Claim]) -> tables.Table:
    table = tables.claims_table(claims, f"{about}, judged with {study.title}")
    table.note = _STUDY_RULES[study.run.study]
    return table


def _question(
    groups: Sequence[Group],
    normality: Sequence[NormalityRun],
    mixed: Sequence[StudyRun],
    packed: Sequence[StudyRun],
) -> str:
    """What the report answers: the main job's question where it ran."""
    if normality and not groups:
        return "Does a Hadamard transform make a Diffusion Transformer’s activations normal?"
    if mixed and not groups:
        return "Do sensitivities measured before training mislead, and is mixed precision worth it?"
    if packed and not groups:
        return "Is the packed W1.58 model as small and as fast as claimed?"
    return "Do ternary weights and 1–4 bit activations keep a Diffusion Transformer’s quality?"


def _stories(
    runs: Sequence[RunData],
    groups: Sequence[Group],
    normality: Sequence[NormalityRun],
    mixed: Sequence[StudyRun],
    kernels: Sequence[StudyRun],
    efficient: Sequence[StudyRun],
) -> list[tuple[Group | None, list[Phrase]]]:
    """The answers in words, the one to lead with first."""
    if groups:
        return [(group, plain_words(group)) for group in groups]
    if normality:
        headline, _ = answer(normality[0])
        details = Phrase(" Where, and by how much", "#normality")
        return [(None, [*headline, details, Phrase(".")])]
    answers = {"sensitivity": sensitivity_answer, "allocation": allocation_answer}
    first = {study.run.study: study for study in reversed(mixed)}
    if first:
        words = [answers[name](first[name]) if name in first else [] for name in answers]
        return [(None, [*words[0], Phrase(" "), *words[1]])]
    if kernels or efficient:
        words = [
            *(efficiency_answer(study) for study in efficient[:1]),
            *(kernel_answer(study) for study in kernels[:1]),
        ]
        return [(None, [*words[0], Phrase(" "), *(words[1] if len(words) > 1 else [])])]
    return [(None, _no_results(runs))]


def _count(runs: Sequence[RunData], left_out: Sequence[LeftOut]) -> str:
    finished = sum(run.finished for run in runs)
    text = f"{plural(finished, 'finished run')}, {len(runs) - finished} unfinished"
    return f"{text}, {len(left_out)} left out" if left_out else text


def _no_results(runs: Sequence[RunData]) -> list[Phrase]:
    waiting = [run for run in runs if not run.finished]
    text = "No finished train-and-eval run is among these runs, so every result is “not run”."
    if waiting:
        text += f" {plural(len(waiting), 'run')} not finished: the same command continues each."
    return [Phrase(text)]


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["css"] = (Path(__file__).parent / "templates/style.css").read_text("utf-8")
    return environment


def _machines(runs: Sequence[RunData]) -> dict[str, Machine]:
    machines: dict[str, Machine] = {}
    for run in runs:
        origin = tables.provenance(run)
        key = _machine_key(origin)
        if key not in machines:
            index = len(machines) + 1
            machines[key] = Machine(
                anchor=f"machine-{index}",
                name=f"Machine {index}: {tables.hardware(origin)}",
                facts=_machine_facts(origin),
                packages=section(origin, "packages"),
            )
    return machines


def _machine_key(origin: Mapping[str, Any]) -> str:
    parts = ("packages", "python", "platform", "cpu", "gpu")
    return json.dumps([origin.get(part) for part in parts], sort_keys=True)


def _machine_facts(origin: Mapping[str, Any]) -> list[tuple[str, str]]:
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


def _run_card(run: RunData, machines: Mapping[str, Machine]) -> dict[str, Any]:
    """What the provenance section prints of one run."""
    manifest, origin = run.manifest, tables.provenance(run)
    sessions = manifest["sessions"]
    code = section(origin, "code")
    code_facts = ", ".join(f"{k} {v}" for k, v in code.items() if v is not None)
    settings = {**section(origin, "torch"), **section(origin, "environment")}
    extra = {k: v for k, v in manifest.items() if k not in _STANDARD_MANIFEST}
    facts = [
        ("config SHA-256", str(manifest["config_sha256"])),
        ("study version", str(manifest.get("study_version", "not recorded"))),
        ("seed", str(run.seed)),
        ("code", code_facts or "not recorded"),
        ("device", str(origin.get("device", "not recorded"))),
        ("threads", str(origin.get("threads", "not recorded"))),
        ("settings", ", ".join(f"{k}={v}" for k, v in settings.items()) or "none"),
        *((key, str(value)) for key, value in flatten(extra).items()),
    ]
    facts += [
        (f"session {i}", f"{s.get('start')} to {s.get('end')}, {s.get('status')}")
        for i, s in enumerate(sessions, start=1)
    ]
    commands = dict.fromkeys(" ".join(map(str, s.get("argv", []))) for s in sessions)
    return {
        "anchor": run.anchor,
        "id": run.id,
        "title": f"{run.plan_name} on {run.workload_name}, seed {run.seed}",
        "study": run.study,
        "facts": facts,
        "commands": [command for command in commands if command],
        "machine": machines[_machine_key(origin)],
        "inputs": _digests(manifest["inputs"]),
        "outputs": [(MANIFEST, run.manifest_sha256), *_digests(manifest["outputs"])],
        "config": sorted((k, _setting(v)) for k, v in flatten(run.config).items()),
    }


def _digests(entries: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(str(name), str(entry["sha256"])) for name, entry in sorted(entries.items())]


def _setting(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
