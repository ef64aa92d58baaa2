"""Fabricated runs in the real run-folder format: every number is made up, none was measured."""

from __future__ import annotations

import copy
import dataclasses
import functools
import io
import json
import math
import os
import random
from collections.abc import Callable, Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from robuq_bench.config import Config, ModelConfig, Plan, resolve
from robuq_bench.config.resolve import training_steps
from robuq_bench.judging.evaluation import seed_ranges
from robuq_bench.runs.run import Run
from robuq_bench.runs.run_files import RESULTS

TYPES = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
LAYERS = [f"blocks.{block}.{kind}" for block in range(4) for kind in TYPES]
MACS = {name: 36864 * {"qkv": 3, "proj": 1}.get(name.rsplit(".", 1)[1], 4) for name in LAYERS}
TEACHER_FID = 4.3
FIDS = {
    "a8": 5.1,
    "a4": 6.4,
    "a3": 7.9,
    "a3-uniform": 8.8,
    "a2": 13.0,
    "a2-uniform": 17.3,
    "baseline-a4": 7.8,
    "baseline-a3": 13.6,
    "baseline-a2": 76.7,
    "bitnetv2-a4": 11.2,
    "bitnetv2-a3": 21.9,
}
# Several ranges of images that all training seeds share, unlike the packaged workload.
RANGES = (
    *("evaluation.num_samples=1000", "evaluation.seed_ranges=3"),
    "evaluation.image_seeds=none",
)


@dataclasses.dataclass
class Fabricator:
    """Makes run folders below `root`; `logged` is how many training records each gets."""

    root: Path
    logged: int = 6
    pictures: bool = True

    def run(
        self,
        plan: str,
        seed: int = 0,
        *,
        overrides: Sequence[str] = (),
        study: str = "train-and-eval",
        finish: bool = True,
        records: list[dict[str, Any]] | None = None,
        argv: Sequence[str] = (),
        fid: float | None = None,
        version: str = "2",
    ) -> Path:
        """Write one run; without `records` those of a whole train-and-eval."""
        config = resolve(study, version, plan, "digits", seed, [*RANGES, *overrides])
        argv = argv or ["bench.py", "train-and-eval", "--plan", plan, "--seed", str(seed)]
        with Run.open(self.root, config, argv) as run:
            path = run.path
        lines = self.records(config, fid) if records is None else records
        # One write for all records: a thousand synced appends would take longer than the tests.
        text = "".join(json.dumps(record) + "\n" for record in lines)
        (path / RESULTS).write_text(text, encoding="utf-8")
        if finish:
            with Run.open(self.root, config, argv) as run:
                if self.pictures:
                    run.write_bytes("samples/grid-student.png", picture(f"{plan}{seed}"))
                    run.write_bytes("samples/grid-teacher.png", picture("teacher"))
                run.finish()
        return path

    def records(self, config: Config, fid: float | None = None) -> list[dict[str, Any]]:
        rng = random.Random(f"{config.plan.name} {config.seed}")
        name = config.plan.name
        level = fid if fid is not None else FIDS.get(name, TEACHER_FID)
        found = [] if name == "fp" else [*self.training(config, level, rng)]
        if config.plan.bits is not None:
            found += sensitivity(rng)
        if name != "fp":
            found.append(allocation(config, rng))
        found += metrics(config, "teacher", TEACHER_FID, random.Random(0))
        twin = random.Random(0) if name == "fp" else rng
        found += metrics(config, "student", level, twin)
        losses = {"distillation_loss": 0.0 if name == "fp" else level / 900 * rng.uniform(0.9, 1.1)}
        losses["denoising_loss"] = 0.062 + losses["distillation_loss"] / 3
        found.append({"key": "validation", "kind": "validation", **losses})
        found.append(accounting(config))
        timing = {"train_s": 212.4 + 5 * rng.random(), "sample_s": 41.37, "total_s": 301.2}
        timing["cpu_s"] = 1.5 * timing["train_s"]
        return [*found, {"key": "timing", "kind": "timing", **timing}]

    def training(self, config: Config, level: float, rng: random.Random) -> list[dict[str, Any]]:
        steps = training_steps(config)
        every = max(1, steps // self.logged)
        return [
            {
                "key": f"train/{step:08d}",
                "kind": "train",
                "step": step,
                "phase": "warmup" if step <= 150 else "qat",
                "loss": (loss := level / 400 + math.exp(-6 * step / steps) * rng.uniform(0.8, 1)),
                "distillation_loss": loss * 0.9,
                "denoising_loss": 0.1,
                "learning_rate": 1e-3 * (1 - step / steps),
                "grad_norm": rng.uniform(0.1, 1),
            }
            for step in range(every, steps + 1, every)
        ]


def metrics(config: Config, subject: str, level: float, rng: random.Random) -> list[dict[str, Any]]:
    count = config.workload.evaluation.num_samples
    starts = [seeds.start for seeds in seed_ranges(config.workload, config.seed)]
    source = {"source_run": "teacher-eval/fp-digits-000000000000"} if subject == "teacher" else {}
    return [
        {
            "key": f"metrics/{subject}/{index}",
            "kind": "metrics",
            "subject": subject,
            "seed_range": index,
            "seed_start": start,
            "num_samples": count,
            "sample_seconds": 13.2,
            **source,
            "fid_digits": level * rng.uniform(0.96, 1.04),
            "fid_digits_is_rank_deficient": 0,
            "sfid_digits": level * 1.9 * rng.uniform(0.96, 1.04),
            "sfid_digits_is_rank_deficient": int(count < 112),
            "is_digits": 9.6 - math.log(level) * rng.uniform(0.5, 0.6),
            "kid_digits": level / 3000 * rng.uniform(0.9, 1.1),
            "kid_digits_torch_fidelity": level / 4000,
            "kid_digits_torch_fidelity_std": 0.001,
            "kid_digits_is_stratified": 1,
            "precision_digits": 0.92 - math.log(level) / 20 + rng.uniform(-0.01, 0.01),
            "recall_digits": 0.88 - math.log(level) / 9 + rng.uniform(-0.01, 0.01),
        }
        for index, start in enumerate(starts)
    ]


def sensitivity(rng: random.Random) -> list[dict[str, Any]]:
    scale = {"qkv": 1.0, "proj": 1.6, "fc1": 0.9, "fc2": 0.4}
    return [
        {
            "key": f"sensitivity/{layer}/{bits}",
            "kind": "sensitivity",
            "layer": layer,
            "bits": bits,
            "mse": scale[layer.rsplit(".", 1)[1]] * 4.0**-bits * rng.uniform(0.01, 0.02),
        }
        for layer in LAYERS
        for bits in (1, 2, 3, 4)
    ]


def allocation(config: Config, rng: random.Random) -> dict[str, Any]:
    plan = config.plan
    rule = plan.rule_for("blocks.0.attn.qkv", "block")
    bits = dict.fromkeys(LAYERS, rule.activation.bits if rule and rule.activation else 32)
    if plan.bits is not None:
        base = round(plan.bits.mean or 0)
        shift = {"proj": 1, "qkv": rng.choice([0, 1]), "fc1": 0, "fc2": -1}
        bits = {name: min(4, base + shift[name.rsplit(".", 1)[1]]) for name in LAYERS}
    by_type = {
        kind: math.fsum(b for name, b in bits.items() if name.endswith(kind)) / 4
        for kind in ("qkv", "proj", "fc1", "fc2")
    }
    total = sum(MACS.values())
    return {
        "key": "allocation",
        "kind": "allocation",
        "bits_by_layer": bits,
        "macs": MACS,
        "mean_bits": min(sum(MACS[name] * b for name, b in bits.items()) / total, 8),
        "objective": None if plan.bits is None else 0.0123,
        "by_type": by_type,
    }


@functools.cache
def account_of(model: ModelConfig, plan: Plan) -> dict[str, Any]:
    from robuq_bench.accounting.account import account

    return account(model, plan)


def accounting(config: Config) -> dict[str, Any]:
    account = account_of(config.workload.model, config.plan)
    return {"key": "accounting", "kind": "accounting", **copy.deepcopy(account)}


@functools.cache
def picture(text: str) -> bytes:
    """A grid of 10 × 4 tiles of 8 × 8 pixels, four screen pixels each."""
    rng = random.Random(text)
    small = Image.new("L", (80, 32))
    small.putdata([rng.choice((0, 40, 200, 255)) for _ in range(80 * 32)])
    buffer = io.BytesIO()
    small.resize((320, 128), Image.Resampling.NEAREST).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


@dataclasses.dataclass
class PageCell:
    """A parsed table cell: its own text, its small print and the first link of its own text."""

    text: str = ""
    small: str = ""
    href: str = ""


@dataclasses.dataclass
class PageTable:
    caption: str = ""
    head: list[PageCell] = dataclasses.field(default_factory=list)
    rows: list[list[PageCell]] = dataclasses.field(default_factory=list)

    def cell(self, row: str, column: str) -> PageCell:
        """The cell where the row that starts with `row` meets `column`."""
        index = [cell.text for cell in self.head].index(column)
        return next(line for line in self.rows if line[0].text == row)[index]


class Page(HTMLParser):
    """Tables, identifiers, links and tags of an HTML page."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.tables: list[PageTable] = []
        self.ids: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self._place = ""
        self._small = False
        self._head = False

    def table(self, caption: str) -> PageTable:
        return next(table for table in self.tables if table.caption.startswith(caption))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.tags.append((tag, found))
        if "id" in found:
            self.ids.append(found["id"])
        if tag == "table":
            self.tables.append(PageTable())
        elif tag in ("thead", "tbody"):
            self._head = tag == "thead"
        elif tag == "tr" and not self._head:
            self.tables[-1].rows.append([])
        elif tag in ("th", "td"):
            self._line().append(PageCell())
            self._place = "cell"
        elif tag in ("caption", "style"):
            self._place = tag
        elif tag == "small":
            self._small = True
        elif tag == "a" and self._place == "cell" and not self._small and not self._cell().href:
            self._cell().href = found.get("href", "")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("th", "td", "caption", "style"):
            self._place = ""
        elif tag == "small":
            self._small = False

    def handle_data(self, data: str) -> None:
        if self._place == "style":
            return
        self.text += data
        if self._place == "caption":
            self.tables[-1].caption += data
        elif self._place == "cell" and self._small:
            self._cell().small += data
        elif self._place == "cell":
            self._cell().text += data

    def _line(self) -> list[PageCell]:
        table = self.tables[-1]
        return table.head if self._head else table.rows[-1]

    def _cell(self) -> PageCell:
        return self._line()[-1]


def parse(path: Path) -> Page:
    page = Page()
    page.feed(path.read_text(encoding="utf-8"))
    return page


@pytest.fixture
def fabricate(tmp_path: Path) -> Fabricator:
    """A fabricator of runs below a fresh folder."""
    return Fabricator(tmp_path / "runs")


@pytest.fixture(scope="session")
def fabricator() -> type[Fabricator]:
    """The class, for fixtures that make runs once."""
    return Fabricator


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing that was drawn before, here or by a user, is taken for what the code draws now.

    The workers of one session share what they draw.
    """
    base = tmp_path_factory.getbasetemp()
    session = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("ROBUQ_CACHE", str(session / "cache"))
        yield


@pytest.fixture(scope="session")
def twelve_plans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of all twelve plans, three training seeds for two of them; read-only."""
    maker = Fabricator(tmp_path_factory.mktemp("twelve") / "runs")
    for plan in ["fp", *FIDS]:
        for seed in (0, 1, 2) if plan in ("a2", "a2-uniform") else (0,):
            maker.run(plan, seed)
    return maker.root


@pytest.fixture(scope="session")
def report(twelve_plans: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of `twelve_plans`."""
    from reports import build_report

    return build_report([twelve_plans], tmp_path_factory.mktemp("report") / "report.html")


@pytest.fixture(scope="session")
def page(report: Path) -> Page:
    """The report of `twelve_plans`, parsed."""
    return parse(report)


@pytest.fixture(scope="session")
def parse_page() -> Callable[[Path], Page]:
    return parse
