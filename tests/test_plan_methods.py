"""Methods that are not the suite's: of any module, registered by hand, and the import order."""

from __future__ import annotations

import hashlib
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from robuq_bench.config import config_from_toml, config_hash, load_plan, resolve, to_toml
from robuq_bench.errors import ConfigError
from robuq_bench.methods import Method, WeightMethod, method_names, register_method


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def plan(tmp_path: Path) -> Any:
    """Loads a plan from its text."""
    return lambda text: load_plan(write(tmp_path / "mine.toml", text))


MODULE = """
from robuq_bench.methods import WeightMethod
VERSION = 1
class Mine(WeightMethod):
    step: float = 0.5
    rounds: int
class Base:
    pass
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of the user's, and a plan that is at home in it."""
    name = f"outside_{hashlib.sha256(str(tmp_path).encode()).hexdigest()[:12]}"
    write(tmp_path / f"{name}.py", MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    return name


def outside(module: str, rest: str = ", rounds = 3") -> str:
    return f"[[layers]]\nname = 'a'\nweight = {{method = '{module}:Mine'{rest}}}\n"


def test_a_method_of_any_module_is_a_method(plan: Any, module: str, tmp_path: Path) -> None:
    source = tmp_path / f"{module}.py"
    weight = plan(outside(module)).layers[0].weight
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    assert weight.model_dump() == {
        "method": f"{module}:Mine", "sha256": digest, "step": 0.5, "rounds": 3,
    }  # fmt: skip
    config = resolve("toy", "1", tmp_path / "mine.toml", "digits")
    again = config_from_toml(to_toml(config), "config.toml")
    assert again == config
    assert type(again.plan.layers[0].weight) is type(weight)
    named = [f"layers.block.weight={module}:Mine", "layers.block.weight.rounds=3"]
    assert resolve("toy", "1", "a4", "digits", 0, named).plan.layers[1].weight == weight


def test_a_changed_source_is_another_run(
    plan: Any, module: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plan(outside(module))
    config = resolve("toy", "1", tmp_path / "mine.toml", "digits")
    text = to_toml(config)
    write(tmp_path / f"{module}.py", MODULE.replace("VERSION = 1", "VERSION = 2"))
    changed = resolve("toy", "1", tmp_path / "mine.toml", "digits")
    assert config_hash(changed) != config_hash(config)
    assert caplog.text == ""
    with caplog.at_level(logging.WARNING):
        assert config_from_toml(text, "config.toml") == config  # the old run stays readable
    assert f"method '{module}:Mine': its source is not the one" in caplog.text


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("nowhere_at_all:Mine", "module 'nowhere_at_all' cannot be imported (ModuleNotFoundError"),
        ("{module}:Mina", "has no 'Mina'; did you mean 'Mine'?"),
        ("{module}:", "has no ''; known: Mine"),
        ("{module}:Base", "Base'> is not a subclass of CentringMethod, ScalingMethod, "),
        ("{module}:VERSION", "1 is not a subclass of CentringMethod, ScalingMethod, "),
        ("{module}:WeightMethod", "WeightMethod'> is not a subclass of CentringMethod, "),
        ("{module}:Mine", "method '{module}:Mine' needs 'rounds'; add it"),
        (":Mine", "module '' cannot be imported (ValueError"),
        (".x:Mine", "module '.x' cannot be imported (TypeError"),
    ],
)
def test_what_is_no_method_is_refused_with_its_reason(
    plan: Any, module: str, method: str, message: str
) -> None:
    for value in (f"'{method}'", f"{{method = '{method}'}}"):
        with pytest.raises(ConfigError) as caught:
            plan(f"[[layers]]\nname = 'a'\nweight = {value.replace('{module}', module)}\n")
        assert "mine.toml: layers.a.weight: " in str(caught.value)
        assert message.replace("{module}", module) in str(caught.value)
        assert caught.value.exit_code == 2


def test_a_method_of_another_slot_and_a_module_that_fails(
    plan: Any, module: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=rf"method '{module}:Mine' is for weight, not rotation"):
        plan(f"[[layers]]\nname = 'a'\nrotation = '{module}:Mine'\n")
    write(tmp_path / f"{module}_broken.py", "1 / 0\n")
    with pytest.raises(ConfigError, match=r"cannot be imported \(ZeroDivisionError: division by"):
        plan(f"[[layers]]\nname = 'a'\nweight = '{module}_broken:Mine'\n")


def test_a_registered_method_is_called_by_its_name(
    plan: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("robuq_bench.methods._registered", {})

    class Mine(WeightMethod):
        step: float = 0.5

    assert register_method("test-mine", Mine) is Mine
    weight = plan("[[layers]]\nweight = {method = 'test-mine', step = 2.0}").layers[0].weight
    assert type(weight) is Mine
    assert weight.step == 2.0
    assert weight.sha256 == hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    assert "test-mine" in method_names("weight")
    with pytest.raises(ConfigError, match="it is a method for weight"):
        plan("[[layers]]\nrotation = 'test-mine'")
    for name, method, message in (
        ("rtn", Mine, "'rtn' is a weight method of the suite; choose another name"),
        ("none", Mine, "a method cannot be called 'none'"),
        ("a:b", Mine, "a method cannot be called 'a:b'"),
        ("", Mine, "a method cannot be called ''"),
        ("x", Method, "is not a subclass of"),
        ("x", int, "is not a subclass of"),
    ):
        with pytest.raises(ConfigError, match=message):
            register_method(name, method)  # type: ignore[type-var]


@pytest.mark.parametrize(
    "code",
    [
        "from robuq_bench.methods import WeightMethod",
        "from robuq_bench.methods.base import Method",
        "import robuq_bench as rq; rq.register_method",
        "import robuq_bench.config",
        "import robuq_bench.methods.weights.rtn",
        "import robuq_bench.sections",
    ],
)
def test_whatever_is_imported_first_there_is_no_circle(code: str) -> None:
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
