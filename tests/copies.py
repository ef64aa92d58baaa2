"""Runs from recorded ones: copies under further training seeds, and with other tables."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from robuq_bench.config import resolve
from robuq_bench.runs.run import Run
from robuq_bench.runs.run_files import CONFIG, DONE, MANIFEST, hash_outputs

RECORDED = Path(__file__).resolve().parents[1] / "reports" / "recorded"


def copy_runs(runs: Sequence[Path], root: Path, count: int) -> None:
    """Write `count` sound run folders below `root`, taking `runs` in turn.

    Numbers are those of the run copied; each copy has a training seed of its own, from 1000 on,
    and the name and checksums that go with it.
    """
    for seed, run in zip(range(1000, 1000 + count), itertools.cycle(runs), strict=False):
        manifest = json.loads((run / MANIFEST).read_text("utf-8"))
        config = (run / CONFIG).read_text("utf-8")
        config = config.replace(f"\nseed = {manifest['seed']}\n", f"\nseed = {seed}\n")
        digest = hashlib.sha256(config.encode()).hexdigest()
        name = f"{run.name.rpartition('-')[0]}-{digest[:12]}"
        folder = root / run.parent.name / name
        shutil.copytree(run, folder)
        (folder / CONFIG).write_text(config, encoding="utf-8")
        manifest |= {
            "id": f"{run.parent.name}/{name}",
            "seed": seed,
            "config_sha256": digest,
            "outputs": hash_outputs(folder),
        }
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        done = hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()
        (folder / DONE).write_text(f"{done}  {MANIFEST}\n", encoding="utf-8")


class RecordedTables:
    """Tables of a recorded run of one study, and runs made of them."""

    def __init__(self, study: str) -> None:
        self.study = study
        folder = next((RECORDED / "digits-allocation" / "runs" / study).glob("*/tables"))
        self.paths = {path.stem: path for path in folder.glob("*.csv")}

    def __getitem__(self, name: str) -> pd.DataFrame:
        return pd.read_csv(self.paths[name])

    def make_run(
        self, root: Path, plan: str = "a4", *, but: Sequence[str] = (), **more: pd.DataFrame
    ) -> Path:
        """A finished run with the recorded tables `but` some, and `more` in their place."""
        config = resolve(self.study, "2", plan, "digits", 0, [])
        with Run.open(root, config, ["bench.py", "study", self.study]) as run:
            for name in self.paths.keys() - {*but, *more}:
                run.write_bytes(f"tables/{name}.csv", self.paths[name].read_bytes())
            for name, frame in more.items():
                run.write_bytes(f"tables/{name}.csv", frame.to_csv(index=False).encode())
            run.finish()
            return run.path


def judged(folder: Path) -> list[str]:
    """Verdicts beside the report, without those of claims that need other studies."""
    verdicts = pd.read_csv(folder / "report-claims.csv")["verdict"]
    return [str(word) for word in verdicts if word != "not run"]
