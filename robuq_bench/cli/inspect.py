"""Commands that only look: plans, workloads, accounting, runs, and this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from robuq_bench.cli import console
from robuq_bench.cli.flags import (
    RUNS,
    JsonFlag,
    NameArgument,
    OutputFlag,
    PlanFlag,
    SetFlag,
    WorkloadFlag,
)
from robuq_bench.cli.job import find_run, show_rows
from robuq_bench.cli.plan_layers import bits_from_file, show_layers
from robuq_bench.errors import CheckError, UsageError

if TYPE_CHECKING:
    from robuq_bench.config import Config, ModelConfig, Plan, Rule

inspect_app = typer.Typer()
runs_app = typer.Typer(no_args_is_help=True, help="List, show and verify run folders.")
RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="An id or a folder.")]


@inspect_app.command()
def plans(
    words: Annotated[
        list[str] | None, typer.Argument(metavar="[show] [NAME]", show_default=False)
    ] = None,
    on: Annotated[
        str | None,
        typer.Option(
            "--on", "--workload", metavar="NAME|FILE", help="Whose model ranks and --layers are of."
        ),
    ] = None,
    layers: Annotated[
        bool, typer.Option("--layers", help="What each layer of a workload's model becomes.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """List the packaged plans, or show one in full (a name or a file), or layer by layer."""
    from robuq_bench.config import load_plan, load_workload, plan_names, to_toml

    name = _plan_name(words or [])
    if on is not None and name is not None and not layers:
        raise UsageError("--on names the model whose --layers are shown; add --layers")
    if name is None and layers:
        raise UsageError("--layers shows one plan; name it, as in `plans a2 --on digits --layers`")
    if name is not None:
        plan = load_plan(name)
        if layers:
            show_layers(plan, load_workload(on or "digits"), as_json)
        elif as_json:
            console.print_json({"plan": plan.model_dump(mode="json")})
        else:
            print(to_toml(plan), end="")
        return
    workload, rows = load_workload(on or "digits"), []
    for plan in map(load_plan, plan_names()):
        rows.append(
            {
                "plan": plan.name,
                "weight bits": _bits_text(plan, "weight"),
                "activation bits": _bits_text(plan, "activation"),
                f"rank on {workload.name}": _rank_text(plan, workload.model),
                "about": plan.description,
            }
        )
    show_rows("plans", rows, as_json)


def _plan_name(words: list[str]) -> str | None:
    """NAME of `plans NAME` and `plans show NAME`; None where there is none."""
    if words[:1] == ["show"]:
        words = words[1:]
        if not words:
            raise UsageError("`plans show` needs the name or file of a plan; `plans` lists them")
    if len(words) > 1:
        raise UsageError(f"`plans` shows one plan at a time, got {' '.join(words)}")
    return words[0] if words else None


def _of_blocks(plan: Plan) -> list[Rule]:
    return [rule for rule in plan.layers if "block" in rule.kind and rule.slots()]


def _bits_text(plan: Plan, of: str) -> str:
    methods = [getattr(rule, of) for rule in _of_blocks(plan)]
    if not any(methods):
        return "full"
    if plan.bits is not None and plan.bits.of == of:
        return "file" if plan.bits.mean is None else f"mean {plan.bits.mean:g}"
    bits = [m if m is None else m.nominal_bits() if of == "weight" else m.bits for m in methods]
    return ", ".join(dict.fromkeys("full" if b is None else f"{b:.3g}" for b in bits))


def _rank_text(plan: Plan, model: ModelConfig) -> str | int:
    """Ranks of the low-rank branches of a model's block layers, 0 for none."""
    from robuq_bench.accounting.layers import layer_rows

    rows = layer_rows(model, plan, bits_from_file(plan, model))
    ranks = {row["branch_rank"] for row in rows if row["kept"] is None and row["kind"] == "block"}
    texts = sorted("?" if rank is None else str(rank) for rank in ranks or {0})
    return int(texts[0]) if len(texts) == 1 and texts != ["?"] else ", ".join(texts)


@inspect_app.command()
def workloads(name: NameArgument = None, as_json: JsonFlag = False) -> None:
    """List the packaged workloads, or show one in full (a name or a file)."""
    from robuq_bench.config import load_workload, to_toml, workload_names

    if name is not None:
        workload = load_workload(name)
        if as_json:
            console.print_json({"workload": workload.model_dump(mode="json")})
        else:
            print(to_toml(workload), end="")
        return
    rows = [
        {
            "workload": workload.name,
            "width": workload.model.hidden_size,
            "depth": workload.model.depth,
            "tokens": (workload.model.input_size // workload.model.patch_size) ** 2,
            "about": workload.description,
        }
        for workload in map(load_workload, workload_names())
    ]
    show_rows("workloads", rows, as_json)


@inspect_app.command()
def account(
    plan: PlanFlag = "a2",
    on: WorkloadFlag = "digits",
    overrides: SetFlag = None,
    as_json: JsonFlag = False,
) -> None:
    """Count parameters, bits, BitOPs and packed bytes of a plan on a workload's model."""
    from robuq_bench.config import resolve

    config = resolve("account", "1", plan, on, 0, overrides or (), uses_data=False)
    facts = _account(config)
    if as_json:
        console.print_json(
            {"command": "account", "plan": config.plan.name, "workload": config.workload.name}
            | facts
        )
        return
    scalars = {key: value for key, value in facts.items() if not isinstance(value, dict | list)}
    rows: list[dict[str, Any]] = [{"quantity": k, "value": v} for k, v in scalars.items()]
    rows += [
        {"quantity": f"{key}: {part}", "value": value}
        for key, parts in facts.items()
        if isinstance(parts, dict) and key not in ("bits_by_kind", "published")
        for part, value in parts.items()
    ]
    tables = [[row for row in rows if row["value"] is not None]]
    tables.append([{"kind": kind} | entry for kind, entry in facts["bits_by_kind"].items()])
    tables += [value for value in facts.values() if isinstance(value, list)]
    tables.append([{"published": key, **entry} for key, entry in facts["published"].items()])
    for table in filter(None, tables):
        console.print_table(table, missing="")
        print()
    if facts["at_published_rank"]:
        rank, own = facts["at_published_rank"]["low_rank_rank"], facts["low_rank_rank"]
        print(
            f"The low-rank branches of this plan have {_ranks_in_words(own)}; the published "
            f"figures are read at {rank} (width 1152): see the column size_reduction_at_rank_{rank}"
            f". For all numbers at that rank: {_rank_flags(config.plan, rank)}",
            flush=True,
        )


def _ranks_in_words(rank: int | None) -> str:
    return "several ranks" if rank is None else f"rank {rank}"


def _rank_flags(plan: Plan, rank: int) -> str:
    """The `--set`s that give the plan branches of `rank`, as `with_branch_rank` does."""
    with_branch = [rule for rule in plan.layers if rule.branch is not None]
    rules = with_branch or [rule for rule in plan.layers if rule.slots()]
    # Only the method of an empty slot can be set; its rank is then 16.
    key = f"branch.rank={rank}" if with_branch else "branch.method=svd"
    return " ".join(f"--set layers.{rule.name}.{key}" for rule in rules)


def _account(config: Config) -> dict[str, Any]:
    from robuq_bench.accounting import account as accounting

    model, plan = config.workload.model, config.plan
    return accounting.account(model, plan, bits_from_file(plan, model))


@inspect_app.command()
def env(as_json: JsonFlag = False) -> None:
    """Say what this machine is and what it can run."""
    from robuq_bench.runs.provenance import environment_report

    facts = environment_report()
    if as_json:
        console.print_json({"command": "env"} | facts)
        return
    for name, value in facts.items():
        if name == "can_run":
            continue
        parts = value.items() if isinstance(value, dict) else ((None, value),)
        for part, text in parts:
            label = name if part is None else f"{name}.{part}"
            print(f"{label:26} {'none' if text is None else text}")
    for ability, answer in facts["can_run"].items():
        word = "yes" if answer["available"] else "no"
        print(f"can run {ability:18} {word}: {answer['why']}", flush=True)


@runs_app.command("list")
def runs_list(output: OutputFlag = RUNS, as_json: JsonFlag = False) -> None:
    """List the runs below the output folder."""
    from robuq_bench.runs.run import list_runs

    rows = [
        {
            "run": summary.id,
            "state": summary.state,
            "seed": summary.seed,
            "items": summary.items,
            "started": summary.started,
            "ended": summary.ended,
        }
        for summary in list_runs(output)
    ]
    if rows or as_json:
        show_rows("runs", rows, as_json)
    else:
        print(f"no runs in {output}", flush=True)


@runs_app.command("show")
def runs_show(run: RunArgument, output: OutputFlag = RUNS, as_json: JsonFlag = False) -> None:
    """Show one run: its state, config, sessions and headline table."""
    from robuq_bench.config import to_toml
    from robuq_bench.context import RunResult
    from robuq_bench.runs.lock import status_of
    from robuq_bench.runs.run import open_existing

    existing = open_existing(find_run(run, output))
    result = RunResult.from_run(existing)
    if as_json:
        console.print_json(
            {
                "run": existing.id,
                "path": existing.path,
                "complete": existing.is_done,
                "config": existing.config.model_dump(mode="json"),
                "manifest": existing.manifest,
                "table": result.table,
            }
        )
        return
    print(to_toml(existing.config))
    sessions = [
        {
            "started": session["start"],
            "ended": session["end"],
            "status": status_of(existing.path, session),
            "device": session["provenance"]["device"],
            "threads": session["provenance"]["threads"],
            "command": " ".join(session["argv"]),
        }
        for session in existing.manifest["sessions"]
    ]
    console.print_table(sessions)
    print()
    if result.table:
        console.print_table(result.table)
    print(f"{'finished' if existing.is_done else 'unfinished'}: {existing.path}", flush=True)


@runs_app.command("verify")
def runs_verify(
    runs: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RUN]...", help="Ids or folders; without any, all runs."),
    ] = None,
    output: OutputFlag = RUNS,
    as_json: JsonFlag = False,
) -> None:
    """Recompute every checksum; exit 3 when a file is missing or changed."""
    from robuq_bench.runs.run import list_runs, verify_run

    if runs:
        paths = [find_run(text, output) for text in runs]
    else:
        paths = [summary.path for summary in list_runs(output)]
    problems = {f"{path.parent.name}/{path.name}": verify_run(path) for path in paths}
    if as_json:
        console.print_json({"command": "verify", "problems": problems})
    for run_id, lines in problems.items():
        if not as_json:
            print(f"{run_id}: {'sound' if not lines else f'{len(lines)} problem(s)'}")
            for line in lines:
                print(f"  {line}")
    bad = [run_id for run_id, lines in problems.items() if lines]
    if bad:
        raise CheckError(f"{len(bad)} of {len(paths)} run(s) are not sound: {', '.join(bad)}")
