"""Provenance: what is recorded is true, changes with the source, and does not import torch."""

from __future__ import annotations

import importlib.metadata
import json
import os
import pwd
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import robuq_bench
from robuq_bench.runs import provenance

ROOT = Path(__file__).resolve().parents[1]


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", *arguments]
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "robuq_bench").mkdir()
    (tmp_path / "robuq_bench" / "a.py").write_text("a = 1\n")
    (tmp_path / "README.md").write_text("text\n")
    git(tmp_path, "init", "-q")
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    provenance.code_version.cache_clear()
    yield tmp_path
    provenance.code_version.cache_clear()


def code_version() -> dict[str, object]:
    provenance.code_version.cache_clear()
    return provenance.code_version()


def test_commit_and_uncommitted_changes(checkout: Path) -> None:
    source = checkout / "robuq_bench" / "a.py"
    before_first_commit = code_version()
    assert before_first_commit["git_sha"] is None
    assert before_first_commit["dirty"] is True

    git(checkout, "add", ".")
    git(checkout, "commit", "-qm", "first")
    clean = code_version()
    assert clean == {
        "version": robuq_bench.__version__,
        "source": "git",
        "git_sha": git(checkout, "rev-parse", "HEAD"),
        "dirty": False,
        "changes_sha256": None,
    }

    (checkout / "README.md").write_text("documents do not decide a result\n")
    assert code_version() == clean

    seen = set()
    for change in ("a = 2\n", "a = 3\n", None):
        source.unlink() if change is None else source.write_text(change)
        dirty = code_version()
        assert dirty["dirty"] is True
        assert dirty["git_sha"] == clean["git_sha"]
        seen.add(dirty["changes_sha256"])
    source.write_text("a = 1\n")
    (checkout / "robuq_bench" / "new é.py").write_text("")
    seen.add(code_version()["changes_sha256"])
    assert len(seen) == 4
    (checkout / "robuq_bench" / "new é.py").unlink()
    assert code_version() == clean


def test_git_hook_variables_do_not_mislead(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    git(checkout, "add", ".")
    git(checkout, "commit", "-qm", "first")
    expected = code_version()
    other = tmp_path_factory.mktemp("other")
    git(other, "init", "-q")
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    assert code_version() == expected


def test_without_git_or_checkout(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    without_git = code_version()
    assert without_git["source"] == "package"
    assert "git" in str(without_git["reason"])
    installed = tmp_path_factory.mktemp("site-packages")
    monkeypatch.setattr(provenance, "ROOT", installed)
    assert code_version() == {"version": robuq_bench.__version__, "source": "package"}


def test_collect_is_json_and_true(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("ROBUQ_SECRET_TOKEN", "never recorded")
    monkeypatch.setenv("ROBUQ_CPU_KERNELS", "off")
    facts = provenance.collect("cpu", 7)
    assert json.loads(json.dumps(facts)) == facts
    for name in ("torch", "diffusers", "torch-fidelity", "numpy", "scipy", "safetensors"):
        assert facts["packages"][name] == importlib.metadata.version(name)
    assert facts["device"] == "cpu"
    assert facts["gpu"] is None
    assert facts["threads"] == 7
    assert facts["torch"]["num_threads"] == torch.get_num_threads()
    assert facts["environment"]["OMP_NUM_THREADS"] == "3"
    assert "never recorded" not in json.dumps(facts)
    assert facts["cpu_kernels"]["available"] is False
    assert "switched off by ROBUQ_CPU_KERNELS=off" in facts["cpu_kernels"]["why"]
    cpu = facts["cpu"]
    assert 1 <= cpu["physical_cores"] <= cpu["logical_cores"] == os.cpu_count()
    assert 2**28 < cpu["memory_bytes"] < 2**50


def test_threads_follow_torch_or_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert provenance.default_threads() == torch.get_num_threads()
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setenv("OMP_NUM_THREADS", "5,2")
    assert provenance.default_threads() == 5
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    assert provenance.default_threads() >= 1


def test_without_torch_nothing_imports_it() -> None:
    code = (
        "import sys\n"
        "from robuq_bench import files\n"
        "from robuq_bench import checkpointing\nfrom robuq_bench.runs import provenance, run\n"
        "facts = provenance.collect('cpu', 1)\n"
        "assert facts['torch'] is None, facts['torch']\n"
        "provenance.code_version()\n"
        "heavy = {'torch', 'numpy', 'scipy', 'pandas', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_report_says_what_can_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    report = provenance.environment_report()
    assert json.loads(json.dumps(report)) == report
    can_run = report["can_run"]
    assert can_run["CPU studies"]["available"] is True
    assert can_run["CUDA"]["available"] == torch.cuda.is_available()
    assert (report["gpu"] is not None) == torch.cuda.is_available()
    assert all(ability["why"] for ability in can_run.values())
    weights = (
        Path(torch.hub.get_dir()) / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    )
    assert can_run["FID with Inception"]["available"] is False
    assert str(weights) in can_run["FID with Inception"]["why"]
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"")
    found = provenance.environment_report()["can_run"]["FID with Inception"]
    assert found == {"available": True, "why": str(weights)}


@pytest.mark.parametrize(
    ("version", "driver", "why"),
    [
        (None, None, "torch is not installed"),
        ("2.13.0+cpu", "570.1", "build for CPUs"),
        ("2.13.0", None, "no NVIDIA driver"),
    ],
)
def test_why_there_is_no_cuda(
    monkeypatch: pytest.MonkeyPatch, version: str | None, driver: str | None, why: str
) -> None:
    packages = {"torch": version} if version else {}
    monkeypatch.setattr(provenance, "_packages", lambda: packages)
    monkeypatch.setattr(provenance, "_driver_version", lambda: driver)
    cuda = provenance.environment_report()["can_run"]["CUDA"]
    assert cuda["available"] is False
    assert why in cuda["why"]


@pytest.mark.gpu
def test_gpu_is_described() -> None:
    facts = provenance.collect("cuda:0", 1)["gpu"]
    assert facts["name"] == torch.cuda.get_device_name(0)
    assert facts["memory_bytes"] > 2**30
    assert facts["driver"]


def test_env_of_a_user_without_a_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    for name in ("HOME", "ROBUQ_CACHE", "XDG_CACHE_HOME", "TORCH_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    report = provenance.environment_report()
    assert report["cache"] == "none: no home folder; set ROBUQ_CACHE"
    assert report["can_run"]["FID with Inception"]["available"] is False


@pytest.mark.parametrize("settings", ["/dev/null/here", ""])
def test_figures_need_no_home_folder(settings: str) -> None:
    code = (
        "import os, pwd\n"
        "def unknown(uid): raise KeyError(uid)\n"
        "pwd.getpwuid = unknown\n"
        "import robuq_bench.figures\n"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("HOME", "MPLCONFIGDIR")}
    if settings:
        environment["MPLCONFIGDIR"] = settings
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "Matplotlib created a temporary cache directory" in done.stderr
