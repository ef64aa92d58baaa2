"""The figure of a training: its losses by step."""

from __future__ import annotations

from typing import Any

import pandas as pd
import seaborn as sns

from robuq_bench.figures import Picture, colour, log_axis, panel


def plot_losses(records: list[dict[str, Any]]) -> Picture:
    """Loss against step; one line per loss that the `train` records of a run hold."""
    frame = pd.DataFrame(records).set_index("step")
    found = [name for name in ("distillation_loss", "denoising_loss") if name in frame]
    lines = frame[found].rename(columns=lambda name: name.replace("_", " "))
    with panel("losses", f"{' and '.join(lines.columns)} by training step") as drawn:
        palette = [colour("after training")] * len(found)  # dashes tell them apart
        sns.lineplot(lines, palette=palette, ax=drawn.axes)
        warmup = [record["step"] for record in records if record.get("phase") == "warmup"]
        if warmup:
            drawn.axes.axvline(
                warmup[-1], linestyle=":", color=colour("muted"), label="bits allocated"
            )
        drawn.axes.set(xlabel="step", ylabel="loss")
        log_axis(drawn.axes, "y")
        drawn.axes.legend(title=None)
    return drawn.picture
