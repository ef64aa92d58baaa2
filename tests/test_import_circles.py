"""No import circle among the modules, by what their sources import, in functions too."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Set
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOTS = ("robuq_bench", "studies", "reports", "kernels")
PACKAGES = ("methods", "quantization", "hadamard", "inference", "config")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def runtime_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those under `if TYPE_CHECKING`, which never run."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for other in child.orelse:
                yield other
                yield from runtime_nodes(other)
            continue
        yield child
        yield from runtime_nodes(child)


def imported(source: str, modules: Set[str]) -> set[str]:
    """The modules that a source names; of `from a import b` a.b if that is one, else a."""
    found: set[str] = set()
    for node in runtime_nodes(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports here are absolute"
            assert node.module is not None
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names & modules
            if not names <= modules:
                found.add(node.module)
    return found


def packages_of(name: str) -> set[str]:
    parts = name.split(".")
    return {".".join(parts[:depth]) for depth in range(1, len(parts))}


def graph_of(sources: dict[str, str]) -> dict[str, set[str]]:
    """Module -> modules that it runs: what it imports, and the packages these stand in."""
    graph: dict[str, set[str]] = {}
    for name, source in sources.items():
        named = imported(source, sources.keys())
        # A module's own packages run before it, whatever they import: only by name they are asked.
        around = {part for each in named for part in packages_of(each)} - packages_of(name)
        graph[name] = ((named | around) & sources.keys()) - {name}
    return graph


def sources() -> dict[str, str]:
    paths = [path for root in ROOTS for path in (ROOT / root).rglob("*.py")]
    return {module_name(path): path.read_text() for path in paths}


def circle_in(graph: dict[str, set[str]]) -> list[str]:
    """The modules of one circle, in order; empty if there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(reversed(error.args[1]))
    return []


def test_no_circle_among_all_modules_that_are_shipped() -> None:
    graph = graph_of(sources())
    assert sum(len(targets) for targets in graph.values()) > 500
    assert "robuq_bench.methods.base" in graph["robuq_bench.methods"]
    assert "robuq_bench.quantization.fast_paths" in graph["robuq_bench.quantization.linear"]
    assert circle_in(graph) == []


@pytest.mark.parametrize(
    ("given", "circle"),
    [
        ({"a": "import b", "b": "import a"}, True),
        ({"a": "def f():\n    from b import c", "b": "import a"}, True),
        ({"a": "import b.c", "b": "", "b.c": "import a"}, True),
        ({"a": "import b.c", "b": "import a", "b.c": ""}, True),
        ({"a": "if TYPE_CHECKING:\n    import b", "b": "import a"}, False),
        ({"a": "import b.c", "b": "from b.c import d", "b.c": ""}, False),
        ({"a": "from b import c", "b": "", "b.c": "from a import d"}, True),
        ({"b": "from b.c import d", "b.c": "from b import e"}, True),
        ({"b": "from b.c import d", "b.c": "from b import e", "b.e": ""}, False),
    ],
)
def test_a_circle_would_be_seen(given: dict[str, str], circle: bool) -> None:
    assert bool(circle_in(graph_of(given))) == circle


@pytest.mark.parametrize("package", PACKAGES)
def test_any_package_can_be_imported_first(package: str) -> None:
    """In a process of its own: a circle shows only from one of its ends."""
    name = f"robuq_bench.{package}"
    done = subprocess.run(
        [sys.executable, "-c", f"import {name}"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
