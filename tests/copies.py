"""Many runs from a few: copies of finished runs under further training seeds."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from robuq_bench.runs.run_files import CONFIG, DONE, MANIFEST, hash_outputs


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
