"""The command that lists what plans can name."""

from __future__ import annotations

import inspect
import json
from typing import Annotated, Any

import typer

from robuq_bench.cli.flags import JsonFlag
from robuq_bench.cli.job import show_rows

methods_app = typer.Typer()


@methods_app.command()
def methods(
    slot: Annotated[
        str | None,
        typer.Argument(help="centring, scaling, rotation, branch, weight or activation."),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """List the methods that a plan's rules can name, with their parameters and defaults."""
    from robuq_bench.errors import UsageError, suggest
    from robuq_bench.methods import SLOTS, method_class, method_names

    if slot is not None and slot not in SLOTS:
        hint = suggest(slot, SLOTS)
        raise UsageError(f"unknown slot {slot!r}{hint}; there are {', '.join(SLOTS)}")
    rows: list[dict[str, Any]] = []
    for each in SLOTS:
        for name in method_names(each) if slot in (None, each) else ():
            found = method_class(each, name)
            fields = {
                key: field
                for key, field in found.model_fields.items()
                if key not in ("method", "sha256")
            }
            parameters = (
                key if field.is_required() else f"{key} = {json.dumps(field.default)}"
                for key, field in fields.items()
            )
            about = inspect.getdoc(found) or ""
            rows.append(
                {
                    "slot": each,
                    "method": name,
                    "parameters": ", ".join(parameters) or "none",
                    "observes": ", ".join(sorted(found.needs)) or "nothing",
                    "about": about.partition("\n\n")[0].replace("\n", " "),
                }
            )
    show_rows("methods", rows, as_json)
