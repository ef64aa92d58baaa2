"""What produced a result: code, packages, machine, threads; and what this machine can run."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

from kernels import cpu_library
from robuq_bench import __version__
from robuq_bench.files import cache_folder, expand_user, sha256_file
from robuq_bench.memory import malloc_settings

__all__ = ["code_version", "collect", "default_threads", "environment_report", "sha256_file"]

ROOT = Path(__file__).resolve().parents[2]
# What decides a result: everything the checkout imports or reads, but no tests or documents.
_SOURCES = ("bench.py", "robuq_bench", "studies", "kernels", "pyproject.toml", "constraints.txt")
_VARIABLES = re.compile(
    r"(OMP|KMP|MKL|OPENBLAS|CUDA|CUBLAS|PYTORCH|TORCH|TRITON|NVIDIA|MALLOC)_\w+"
    r"|PYTHONHASHSEED|GLIBC_TUNABLES|ROBUQ_CPU_\w+"
)
_INCEPTION = "weights-inception-2015-12-05-6726825d.pth"
_REPORTED = ("torch", "torchvision", "diffusers", "torch-fidelity", "triton", "numpy", "scipy")


def collect(device: str, threads: int) -> dict[str, Any]:
    """Return what a result depends on besides its config, as JSON values.

    Args:
        device: where the run computes: 'cpu', 'cuda' or 'cuda:N'. Torch is imported for a CUDA
            device alone; otherwise its settings are recorded if it is loaded already.
        threads: CPU threads in use. Results are bit-identical at equal thread counts only.

    Returns:
        code (git sha and hash of uncommitted changes, or package version), packages (name to
        version), python, platform, cpu, gpu (None off CUDA), device, threads, environment
        (OMP_*, MKL_*, CUDA_*, …), cpu_kernels (available, and with what or why not), malloc (see
        `keep_freed_memory`) and torch settings. Memory is in bytes.
    """
    return {
        "code": code_version(),
        "packages": _packages(),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cpu_kernels": _cpu_kernels_ability(),
        "gpu": _gpu(device) if device.startswith("cuda") else None,
        "device": device,
        "threads": threads,
        "environment": {
            name: value for name, value in sorted(os.environ.items()) if _VARIABLES.fullmatch(name)
        },
        "malloc": malloc_settings(),
        "torch": _torch_settings(),
    }


def default_threads() -> int:
    """Return how many CPU threads torch uses, or will use if it is not loaded yet."""
    torch = sys.modules.get("torch")
    if torch is not None:
        return int(torch.get_num_threads())
    stated = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    return int(stated) if stated.isdigit() and int(stated) > 0 else _cpu()["physical_cores"]


@cache
def code_version() -> dict[str, Any]:
    """Return version, source ('git' or 'package'), git_sha, dirty and changes_sha256.

    `changes_sha256` hashes path and content of every source file that differs from the commit
    (new, changed or deleted); it is None for a clean checkout. Without git, or installed as a
    package, `source` is 'package', and `reason` says why a checkout could not be asked.
    """
    version: dict[str, Any] = {"version": __version__, "source": "package"}
    if not (ROOT / ".git").exists():
        return version
    try:
        status = _git("status", "--porcelain", "-z", "--no-renames", "-uall", "--", *_SOURCES)
    except (OSError, subprocess.SubprocessError) as error:
        return {**version, "reason": _reason(error)}
    try:
        sha = _git("rev-parse", "--verify", "-q", "HEAD").decode().strip()
    except subprocess.CalledProcessError:
        sha = None  # a repository before its first commit
    changed = sorted(entry[3:].decode("utf-8", "surrogateescape") for entry in status.split(b"\0"))
    changes = hashlib.sha256()
    for name in filter(None, changed):
        path = ROOT / name
        content = sha256_file(path) if path.is_file() else "deleted"
        changes.update(f"{name}\0{content}\0".encode("utf-8", "surrogateescape"))
    dirty = any(changed)
    return {
        **version,
        "source": "git",
        "git_sha": sha,
        "dirty": dirty,
        "changes_sha256": changes.hexdigest() if dirty else None,
    }


def _git(*arguments: str) -> bytes:
    # Inside a git hook these variables point at another repository.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    environment["GIT_OPTIONAL_LOCKS"] = "0"
    command = ["git", "-C", str(ROOT), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, check=True, timeout=20)
    return done.stdout


def _reason(error: Exception) -> str:
    stderr = getattr(error, "stderr", None)
    return (stderr.decode(errors="replace").strip() if stderr else "") or str(error)


@cache
def _packages() -> dict[str, str]:
    found = ((dist.name, dist.version) for dist in importlib.metadata.distributions())
    normal = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in found if name}
    return dict(sorted(normal.items()))


@cache
def _cpu() -> dict[str, Any]:
    logical = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else logical
    model, physical = platform.processor() or platform.machine(), usable
    information = Path("/proc/cpuinfo")
    if information.exists():
        text = information.read_text(errors="replace")
        name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
        model = name[1].strip() if name else model
        cores = set(re.findall(r"physical id\s*:\s*(\d+).*?core id\s*:\s*(\d+)", text, re.DOTALL))
        physical = min(len(cores) or usable, usable)
    return {
        "model": model,
        "logical_cores": logical,
        "physical_cores": physical,
        "usable_cores": usable,
        "memory_bytes": _memory_bytes(),
    }


def cpu_label() -> str:
    """This CPU's name for runs that measure it, as exact as the system tells, and its cores."""
    parts, information = [], Path("/proc/cpuinfo")
    if information.exists():
        text = information.read_text(errors="replace")
        for name in ("cpu family", "model", "stepping"):
            found = re.search(rf"^{name}\s*:\s*(\S+)$", text, re.MULTILINE)
            parts += [f"{name.removeprefix('cpu ')} {found[1]}"] if found else []
    cpu = _cpu()
    exact = f" ({', '.join(parts)})" if parts else ""
    return f"{cpu['model']}{exact}, {cpu['logical_cores']} cores"


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not a POSIX system
        return None


def _gpu(device: str) -> dict[str, Any] | None:
    """Return what torch says of a CUDA device, None if it has none."""
    import torch

    if not torch.cuda.is_available():
        return None
    index = int(device.partition(":")[2] or torch.cuda.current_device())
    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "index": index,
        "count": torch.cuda.device_count(),
        "memory_bytes": properties.total_memory,
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "driver": _driver_version(),
    }


def _driver_version() -> str | None:
    module = Path("/proc/driver/nvidia/version")
    if module.exists():
        found = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", module.read_text(errors="replace"))
        if found:
            return found[1]
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(done.stdout.split()), None)


def _torch_settings() -> dict[str, Any] | None:
    torch = sys.modules.get("torch")
    if torch is None:
        return None
    return {
        "num_threads": torch.get_num_threads(),
        "num_interop_threads": torch.get_num_interop_threads(),
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }


def environment_report() -> dict[str, Any]:
    """Return what this machine is and what it can run, as JSON values (for `bench.py env`).

    `can_run` maps each ability to {"available": bool, "why": str}. Torch is imported only where an
    NVIDIA driver and a CUDA build of torch make the question worth its two seconds.
    """
    packages = _packages()
    cuda = _cuda_ability(packages.get("torch"))
    return {
        "code": code_version(),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "platform": platform.platform(),
        "cpu": _cpu(),
        "gpu": _gpu("cuda") if cuda["available"] else None,
        "threads": default_threads(),
        "cache": str(cache_folder() or "none: no home folder; set ROBUQ_CACHE"),
        "packages": {name: packages.get(name) for name in _REPORTED},
        "can_run": {
            "CPU studies": _cpu_ability(packages),
            "CPU kernels": _cpu_kernels_ability(),
            "CUDA": cuda,
            "Triton kernels": _triton_ability(packages.get("triton"), cuda["available"]),
            "FID with Inception": _inception_ability(packages.get("torch-fidelity")),
        },
    }


def _ability(available: bool, why: str) -> dict[str, Any]:
    return {"available": available, "why": why}


def _cpu_ability(packages: dict[str, str]) -> dict[str, Any]:
    needed = ("torch", "diffusers", "torch-fidelity", "scikit-learn")
    missing = [name for name in needed if name not in packages]
    why = f"missing: {', '.join(missing)}" if missing else "workload digits, every plan"
    return _ability(not missing, why)


def _cpu_kernels_ability() -> dict[str, Any]:
    try:
        return _ability(True, cpu_library.describe())
    except cpu_library.MissingKernels as missing:
        return _ability(
            False,
            f"{missing}. Everything runs without them, packed models and training on a CPU "
            "slower; `study kernels --device cpu` times both",
        )


def _cuda_ability(torch_version: str | None) -> dict[str, Any]:
    if torch_version is None:
        return _ability(False, "torch is not installed")
    if torch_version.endswith("+cpu"):
        return _ability(False, f"torch {torch_version} is a build for CPUs")
    driver = _driver_version()
    if driver is None:
        return _ability(False, "no NVIDIA driver")
    import torch

    if not torch.cuda.is_available():
        return _ability(False, f"torch {torch_version} finds no device (driver {driver})")
    return _ability(True, f"{torch.cuda.get_device_name()}, driver {driver}")


def _triton_ability(version: str | None, cuda: bool) -> dict[str, Any]:
    if version is None or importlib.util.find_spec("triton") is None:
        return _ability(False, "triton is not installed: pip install triton")
    if cuda:
        return _ability(True, f"triton {version}: correctness and timings")
    return _ability(True, f"triton {version}: correctness in its interpreter, timings need a GPU")


def _inception_ability(torch_fidelity_version: str | None) -> dict[str, Any]:
    if torch_fidelity_version is None:
        return _ability(False, "torch-fidelity is not installed")
    weights = _hub_folder() / "checkpoints" / _INCEPTION
    if os.path.isfile(weights):  # False, where Path.is_file raises, in a folder that is not ours
        return _ability(True, str(weights))
    return _ability(False, f"no weights at {weights}: give a path, or let torch-fidelity download")


def _hub_folder() -> Path:
    """Return torch.hub's folder by its documented rules, without importing torch."""
    cache_home = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    home = os.environ.get("TORCH_HOME") or os.path.join(cache_home, "torch")
    return expand_user(home) / "hub"
