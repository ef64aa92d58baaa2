"""Run folders small enough to be committed: configs and numbers, without samples and weights."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from robuq_bench.files import atomic_write_bytes, atomic_write_text, make_folder, sha256_file
from robuq_bench.runs.run_files import CONFIG, DONE, MANIFEST, RESULTS, check_done

KEPT = (CONFIG, RESULTS)
NOT_KEPT = "outputs_not_kept"


def export_runs(folders: Iterable[Path], target: Path) -> list[Path]:
    """Copy finished runs to `target`, which is a folder of runs then.

    Config and records stay as they are, byte for byte. The manifest lists what else the run held
    under `outputs_not_kept`, by SHA-256, so that whoever has the whole run can check it.

    Raises:
        CheckpointError: a run is damaged; names the file.
    """
    written = []
    for folder in folders:
        manifest = check_done(folder)
        outputs = manifest["outputs"]
        lost = {name: entry["sha256"] for name, entry in outputs.items() if name not in KEPT}
        kept = {name: entry for name, entry in outputs.items() if name in KEPT}
        lost = {**manifest.get(NOT_KEPT, {}), **lost}
        copy = target / folder.parent.name / folder.name
        make_folder(copy)
        for name in kept:
            atomic_write_bytes(copy / name, (folder / name).read_bytes())
        text = json.dumps({**manifest, "outputs": kept, NOT_KEPT: lost}, ensure_ascii=False)
        atomic_write_text(copy / MANIFEST, text + "\n")
        atomic_write_text(copy / DONE, f"{sha256_file(copy / MANIFEST)}  {MANIFEST}\n")
        written.append(copy)
    return written
