"""What a user meets before any model: imports, help, pins, package files, README commands."""

from __future__ import annotations

import ast
import functools
import importlib.metadata
import os
import re
import resource
import shlex
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.tags import Tag
from packaging.utils import canonicalize_name, parse_wheel_filename

import robuq_bench
from kernels import build

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
HEAVY = ("torch", "torchvision", "scipy", "pandas", "matplotlib", "seaborn", "diffusers", "sklearn")


def python(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=100
    )


def cpu_seconds(*arguments: str) -> float:
    """Least CPU time of three runs: elapsed time too on a quiet machine, stable on a busy one."""
    best = float("inf")
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = python(*arguments)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == 0, done.stderr
        best = min(best, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return best


def test_import_is_fast_and_light() -> None:
    assert cpu_seconds("-c", "import robuq_bench") < 0.5
    names = "{m.partition('.')[0] for m in sys.modules}"
    done = python("-c", f"import robuq_bench, sys; print(*sorted({names} & set({HEAVY})))")
    assert done.stdout.split() == []


@pytest.mark.parametrize("arguments", [("--help",), ("train-and-eval", "--help")])
def test_help_is_fast(arguments: tuple[str, ...]) -> None:
    assert cpu_seconds("bench.py", *arguments) < 0.5


@pytest.mark.parametrize("arguments", [("--help",), ("plans", "--help"), ("workloads",)])
def test_help_imports_nothing_heavy(arguments: tuple[str, ...]) -> None:
    done = python("-X", "importtime", "bench.py", *arguments)
    assert done.returncode == 0, done.stderr
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "typer" in imported
    assert imported & set(HEAVY) == set()


def test_public_names_load_on_first_use() -> None:
    for name in robuq_bench.__all__:
        assert getattr(robuq_bench, name) is not None
    assert robuq_bench.load_plan("a2").name == "a2"
    assert set(robuq_bench.__all__) <= set(dir(robuq_bench))
    with pytest.raises(AttributeError, match="nothing_here"):
        _ = robuq_bench.nothing_here


# diffusers and transformers probe for a third-party package called `kernels`, our folder's name
HUB = f"""
import sys
sys.path.append({str(ROOT)!r})
from robuq_bench._compat import import_torchvision
import_torchvision()
import diffusers, kernels, transformers
from diffusers import DDIMScheduler, DDPMScheduler, DiTTransformer2DModel
from diffusers.utils import is_kernels_available as in_diffusers
from transformers.utils import is_kernels_available as in_transformers
print(kernels.__file__, in_diffusers(), in_transformers())
"""


@pytest.mark.slow
def test_hub_libraries_import_beside_our_kernels_folder(tmp_path: Path) -> None:
    here = ROOT
    if not (ROOT / "kernels").is_dir():
        here = tmp_path
        (here / "kernels").mkdir()
        (here / "kernels" / "__init__.py").touch()
    done = python("-c", HUB, cwd=here)
    assert done.returncode == 0, done.stderr
    expected = [str(here / "kernels" / "__init__.py"), "False", "False"]
    assert done.stdout.split() == expected, "our folder must be found, and not as the hub's package"


def requirements() -> list[Requirement]:
    project = PYPROJECT["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    return [Requirement(line) for group in groups for line in group]


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if "==" in line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pairs}


@pytest.mark.parametrize("requirement", requirements(), ids=str)
def test_pinned_versions_satisfy_the_declared_ranges(requirement: Requirement) -> None:
    if requirement.name == "triton":
        pytest.skip("torch chooses triton's version")
    assert requirement.specifier.contains(pins()[canonicalize_name(requirement.name)])


def test_pins_name_no_build_variant() -> None:
    assert [version for version in pins().values() if "+" in version] == []


distributions = functools.cache(importlib.metadata.packages_distributions)


def imported(folder: Path) -> set[str]:
    """Top-level names of what the Python files under `folder` import, wherever in the file."""
    names: set[str] = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names.add(node.module.partition(".")[0])
    return names


@pytest.mark.parametrize("folder", ["robuq_bench", "studies", "reports", "kernels", "tests"])
def test_every_import_is_declared(folder: str) -> None:
    providers = distributions()
    ours = {path.name for path in ROOT.iterdir() if path.is_dir()} | {
        "conftest",
        "compiled",
        "configuring",
        "copies",
        "making",
    }
    declared = {canonicalize_name(requirement.name) for requirement in requirements()}
    foreign = imported(ROOT / folder) - set(sys.stdlib_module_names) - ours
    undeclared = {
        name
        for name in foreign
        if not declared & {canonicalize_name(provider) for provider in providers.get(name, [name])}
    }
    assert foreign
    assert undeclared == set()


def test_kernels_stand_alone() -> None:
    foreign = imported(ROOT / "kernels") - set(sys.stdlib_module_names) - {"kernels"}
    assert foreign == {"torch", "triton"}


def test_the_library_needs_no_triton() -> None:
    """Until a kernel runs: neither packing nor training on a CPU may import it."""
    code = (
        "import sys, robuq_bench.inference, robuq_bench.quantization.convert\n"
        "assert 'triton' not in sys.modules and 'torch._dynamo' not in sys.modules"
    )
    done = python("-c", code, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_loading_a_teacher_needs_no_compiler() -> None:
    """Building it on "meta" imported torch._dynamo: a second in every process that loads one."""
    code = (
        "import sys, torch\n"
        "from robuq_bench.config import load_workload\n"
        "from robuq_bench.models.checkpoints import load_teacher\n"
        "load_teacher(load_workload('digits'), torch.device('cpu'))\n"
        "assert 'torch._dynamo' not in sys.modules"
    )
    done = python("-c", code, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_one_version_everywhere() -> None:
    version = re.escape(robuq_bench.__version__)
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^version: {version}$", citation, re.MULTILINE)
    assert re.search(rf"^## \[{version}\]", changelog, re.MULTILINE)


@pytest.mark.parametrize("package", ["robuq_bench", "reports"])
def test_every_data_file_is_packaged(package: str) -> None:
    folder = ROOT / package
    patterns = PYPROJECT["tool"]["setuptools"]["package-data"][package]
    packaged = {path for pattern in patterns for path in folder.glob(pattern)}
    recorded = folder / "recorded"  # documents of the checkout, not needed at run time
    found = {
        path
        for path in folder.rglob("*")
        if path.is_file()
        and path.suffix not in {".py", ".pyc", ".tmp"}
        and recorded not in path.parents
    }
    assert found, f"no data file under {package}"
    assert found - packaged == set()


def test_everything_that_the_kernels_are_compiled_from_is_packaged() -> None:
    folder = ROOT / "kernels"
    patterns = PYPROJECT["tool"]["setuptools"]["package-data"]["kernels"]
    packaged = {path for pattern in patterns for path in folder.glob(pattern)}
    assert packaged == {folder / name for name in (*build.SOURCES, *build.HEADERS)}


def setup_py(
    tmp_path: Path, command: str, compiler: str, required: bool
) -> subprocess.CompletedProcess[str]:
    """Run a command of setup.py on the kernels alone, with a shell script as the compiler."""
    (tmp_path / "robuq_bench").mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "kernels", "robuq_bench/__init__.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    script = tmp_path / "compiler"
    script.write_text(f"#!/bin/sh\n{compiler}\n")
    script.chmod(0o755)
    chosen = {"CXX": str(script), "ROBUQ_REQUIRE_CPU_KERNELS": str(int(required))}
    return subprocess.run(
        [sys.executable, "setup.py", "-q", command],
        cwd=tmp_path,
        env=os.environ | chosen,
        capture_output=True,
        text=True,
    )


def test_one_wheel_for_every_python_of_a_platform(tmp_path: Path) -> None:
    writes = 'for output; do :; done; echo compiled > "$output"'
    done = setup_py(tmp_path, "bdist_wheel", writes, required=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = (tmp_path / "dist").iterdir()
    platform = re.sub("[.-]", "_", sysconfig.get_platform())
    tags = {Tag("py3", "none", platform)}
    assert parse_wheel_filename(wheel.name)[3] == tags
    assert zipfile.ZipFile(wheel).read("kernels/_cpu.so") == b"compiled\n"


@pytest.mark.parametrize("required", [False, True])
def test_a_failed_compilation_fails_where_kernels_are_required(
    tmp_path: Path, required: bool
) -> None:
    done = setup_py(tmp_path, "build_ext", "echo it is broken >&2; exit 1", required)
    assert "it is broken" in done.stderr
    assert (done.returncode != 0) == required


def readme_commands() -> list[str]:
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8") if readme.exists() else ""
    blocks = re.findall(r"^```(?:bash|sh|console|shell)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line.partition(" #")[0].removeprefix("$ ").strip() for line in lines if line.strip()]


def bench_commands() -> list[list[str]]:
    """Arguments of every `bench.py …` in README and docs, in blocks, sentences and tables."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    text = "".join(page.read_text(encoding="utf-8") for page in pages)
    inline = re.findall(r"(?<!`)`(?:python )?(bench\.py [^`]+)`(?!`)", text)
    found = [shlex.split(line.removeprefix("python ")) for line in readme_commands() + inline]
    unique = {tuple(words[1:]) for words in found if words[0] == "bench.py"}
    return [list(words) for words in sorted(unique)]


def test_readme_plan_file_is_valid(tmp_path: Path) -> None:
    from robuq_bench.config import load_plan

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = text.split("```toml\n")[1].split("```")[0]
    (tmp_path / "mine.toml").write_text(block)
    plan = load_plan(tmp_path / "mine.toml")
    assert plan.bits is not None
    assert plan.bits.mean == 2.5
    assert plan.uniform_bits == 4
    assert not re.search(r"@[A-Z_]+@", text), "a placeholder was left in the README"


def test_readme_shows_the_two_commands_and_the_main_job() -> None:
    assert {"make demo", "make test"} <= set(readme_commands())
    assert ["train-and-eval", "--plan", "a2"] in bench_commands()


@pytest.mark.parametrize("arguments", bench_commands(), ids=shlex.join)
def test_readme_bench_command_parses(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import typer.main

    from robuq_bench.cli import job
    from robuq_bench.cli.app import app

    command = typer.main.get_command(app)
    words = [word for word in arguments if word not in {"--help", "--version"}]
    while words and hasattr(command, "commands"):
        assert words[0] in command.commands
        command = command.commands[words.pop(0)]
    if hasattr(command, "commands"):
        return  # a group alone shows its help
    context = command.make_context("bench.py", words)
    settings = [text for text in context.params.get("overrides") or [] if "FILE" not in text]
    if arguments[0] == "study" and context.params["name"]:
        name, *inputs = (context.params[k] for k in ("name", "activations", "checkpoint", "part"))
        monkeypatch.setattr(job, "find_run", lambda text, _root: Path(text))  # there is no RUN
        settings = [*job.study_inputs(name, *inputs, Path("runs")), *settings]
        robuq_bench.config.resolve(name, "1", "a2", "digits", 0, settings)
    plan = context.params.get("plan")
    if isinstance(plan, str) and "/" not in plan:
        assert robuq_bench.load_plan(plan).name == plan


@pytest.mark.parametrize(
    "words",
    [shlex.split(line) for line in readme_commands() if line.startswith("make ")],
    ids=shlex.join,
)
def test_readme_make_command_exists(words: list[str]) -> None:
    done = subprocess.run([*words, "--dry-run"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
