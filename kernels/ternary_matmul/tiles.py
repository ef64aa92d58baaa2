"""Which variant and tile a shape takes: a table, replaced by measurement where there was one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Variant = Literal["tile", "skinny", "scratch"]
VARIANTS: tuple[Variant, ...] = ("tile", "skinny", "scratch")

MULTIPROCESSORS = 132
"""Of an H100 or H200, which the table is made for."""

WARPS = 8
"""Of one processor, that hold a product's block in registers."""

MANY_ROWS = 4096
"""Tokens from which unpacking a weight once, some 4 µs, costs a few percent of its product."""

ALIGNED_WIDTH = 16
"""Bytes of which rows must be a multiple for tensor copies."""


@dataclass(frozen=True)
class Tile:
    """Block of outputs and tokens, packed bytes of K per step, and launch settings.

    Attributes:
        block_n, block_m: outputs and tokens of one program.
        step_bytes: packed bytes per row and step, 32 or 64 (128 or 256 columns).
        splits: parts of K (skinny only).
    """

    block_n: int
    block_m: int
    step_bytes: int
    num_warps: int
    num_stages: int
    splits: int = 1


# Triton waits for every int8 product before the next step (it overlaps float32 sums only), so two
# programs per processor, or more columns per step, are what keeps the tensor cores busy.
SQUARE = Tile(128, 128, 32, 4, 4)
SQUARE_DEEP = Tile(128, 128, 64, 4, 3)
TALL = Tile(256, 128, 32, 8, 4)
WIDE = Tile(128, 256, 32, 8, 4)
WIDE_DEEP = Tile(128, 256, 64, 8, 3)
NARROW = Tile(256, 64, 32, 4, 4)

TILES: dict[Variant, tuple[Tile, ...]] = {
    "tile": (
        SQUARE,
        SQUARE_DEEP,
        TALL,
        WIDE,
        WIDE_DEEP,
        NARROW,
        Tile(128, 64, 32, 4, 4),
        Tile(64, 64, 32, 4, 6),
        Tile(64, 64, 64, 4, 4),
    ),
    "skinny": tuple(
        Tile(block_n, block_m, step_bytes, 4, 4, splits)
        for block_n, block_m, step_bytes in (
            (64, 16, 64),
            (128, 16, 64),
            (128, 32, 64),
            (128, 64, 64),
            (256, 64, 32),
            (128, 128, 32),
        )
        for splits in (1, 2, 4)
    ),
    "scratch": (
        Tile(128, 256, 32, 8, 4),
        Tile(256, 128, 32, 8, 3),
        Tile(128, 128, 32, 4, 3),
    ),
}
"""Tiles worth timing; `autotune` tries those that fit the shape."""


def choose_variant(rows: int, outputs: int, width: int) -> Variant:
    """Variant of a shape that was not timed.

    Few tokens, or so few tiles that half the processors would idle, take the skinny kernel with
    its splits of K; many tokens unpack to memory once; everything else unpacks in registers.
    """
    tiles = -(-outputs // 128) * -(-rows // 128)
    if rows <= 128 or (tiles < MULTIPROCESSORS // 2 and width >= 512):
        return "skinny"
    return "scratch" if rows >= MANY_ROWS and width % ALIGNED_WIDTH == 0 else "tile"


def default_tile(variant: Variant, rows: int, outputs: int, width: int, groups: int = 1) -> Tile:
    """Entry of the table for a shape that was not timed; depends on nothing but the arguments."""
    if variant == "skinny":
        block_m = next((size for size in (16, 32, 64) if rows <= size), 128)
        block_n = 256 if 32 < rows <= 64 and groups > 1 else 128
        step_bytes = 32 if block_n == 256 or block_m == 128 else 64
        programs = -(-outputs // block_n) * -(-rows // block_m) * groups
        steps = -(-width // (4 * step_bytes))
        splits = 1
        # Up to two programs per processor, of at least two steps each.
        while programs * splits < MULTIPROCESSORS and steps >= 4 * splits and splits < 8:
            splits *= 2
        return Tile(block_n, block_m, step_bytes, 4, 4, splits)
    if variant == "scratch":
        return TILES["scratch"][0]
    # 256 columns per step where they divide K: half as many waits.
    return SQUARE_DEEP if width % 256 == 0 else SQUARE


def candidates(rows: int, outputs: int, width: int) -> list[tuple[Variant, Tile]]:
    """Pruned list of what is worth timing for a shape."""
    found: list[tuple[Variant, Tile]] = []
    skinny = rows <= 128 or choose_variant(rows, outputs, width) == "skinny"
    if skinny:
        block_m = min(128, max(16, 1 << (rows - 1).bit_length()))
        found += [
            ("skinny", tile)
            for tile in TILES["skinny"]
            if block_m // 2 <= tile.block_m <= block_m
            and tile.splits * tile.step_bytes * 4 <= width
        ]
    if rows > 64:
        found += [
            ("tile", tile)
            for tile in TILES["tile"]
            if tile.step_bytes == 32 or width % (4 * tile.step_bytes) == 0
        ]
    if rows >= 1024 and width % ALIGNED_WIDTH == 0:
        found += [("scratch", tile) for tile in TILES["scratch"]]
    return found
