"""The figure of who got how many bits."""

from __future__ import annotations

from typing import Any

import pandas as pd

from robuq_bench.figures import Picture, heat, panel
from robuq_bench.quantization.convert import layer_type

MOST_TEXTS = 16  # columns whose cells have room for a number


def plot_allocation(allocation: dict[str, Any]) -> Picture:
    """Bits of every layer: a row per layer type, a column per block."""
    of = allocation.get("of", "activation")
    bits = pd.Series(allocation["bits_by_layer"], dtype=int)
    kinds = pd.Series(bits.index.map(layer_type), index=bits.index, name="layer type")
    block = kinds.groupby(kinds).cumcount().rename("block")
    frame = bits.groupby([kinds, block], sort=False).first().unstack("block")
    alt = f"{of} bits of every layer, mean {allocation['mean_bits']:.3f} (by operations)"
    with panel("allocation", alt, title=f"mean {allocation['mean_bits']:.3f} bits") as drawn:
        edges = [edge - 0.5 for edge in range(bits.min(), bits.max() + 2)]
        heat(frame, drawn.axes, edges, f"{of} bits", texts=frame.shape[1] <= MOST_TEXTS)
    return drawn.picture
