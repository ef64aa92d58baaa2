"""Figures that runs keep: plain matplotlib SVG with reproducible bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator

from robuq_bench.quantization.convert import layer_type

SVG_SALT = "robuq-bench"


def save_svg(figure: Any, path: Path) -> None:
    """Write and close a figure; the same figure gives the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": SVG_SALT}):
        figure.savefig(path, format="svg", metadata={"Date": None}, bbox_inches="tight")
    plt.close(figure)


def plot_losses(records: list[dict[str, Any]], path: Path) -> None:
    """Loss against step; one line per loss that the records hold."""
    figure, axes = plt.subplots(figsize=(6, 3))
    steps = [record["step"] for record in records]
    for name in ("distillation_loss", "denoising_loss"):
        if name in records[0]:
            axes.plot(steps, [record[name] for record in records], label=name.replace("_", " "))
    switch = [r["step"] for r in records if r.get("phase") == "warmup"]
    if switch:
        axes.axvline(switch[-1], linestyle=":", color="gray", label="bits allocated")
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    axes.legend(frameon=False)
    save_svg(figure, path)


def plot_allocation(allocation: dict[str, Any], path: Path) -> None:
    """Activation bits of every layer, grouped by layer type, block by block."""
    bits: dict[str, int] = allocation["bits_by_layer"]
    types = list(dict.fromkeys(layer_type(name) for name in bits))
    figure, axes = plt.subplots(figsize=(6, 3))
    for offset, kind in enumerate(types):
        own = [value for name, value in bits.items() if layer_type(name) == kind]
        positions = [
            block + (offset - (len(types) - 1) / 2) * 0.8 / len(types) for block in range(len(own))
        ]
        axes.bar(positions, own, width=0.8 / len(types), label=kind)
    axes.set(
        xlabel="block",
        ylabel="activation bits",
        title=f"mean {allocation['mean_bits']:.3f} bits (MAC-weighted)",
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, ncols=len(types))
    save_svg(figure, path)
