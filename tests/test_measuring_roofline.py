"""Rooflines against numbers worked out by hand and the published end-to-end table."""

from __future__ import annotations

import pytest
import torch

from robuq_bench.measuring.roofline import (
    DATA_SHEETS,
    Product,
    Quantization,
    Transformer,
    end_to_end,
    end_to_end_rows,
    least_seconds,
)

XL = Transformer.named("XL")


def test_bytes_and_operations_of_fc1_by_hand() -> None:
    fc1 = Product(rows=32768, width=1152, outputs=4608)
    assert fc1.operations == 2 * 32768 * 1152 * 4608
    assert fc1.full_precision_bytes == 2 * (1152 * 4608 + 32768 * 1152 + 32768 * 4608)
    assert fc1.weight_bytes == 4608 * 1152 // 4
    codes, tokens, channels = 32768 * 1152, 12 * 32768, 10 * 4608
    assert fc1.ternary_bytes == 1152 * 4608 // 4 + codes + tokens + channels + 2 * 32768 * 4608


def test_packed_weight_bytes_are_those_of_the_layout() -> None:
    from kernels.ternary_matmul.layout import pack_planes

    for width in (144, 384, 1152):
        planes = pack_planes(torch.zeros(5, width, dtype=torch.int8))
        assert Product(1, width, 5).weight_bytes == planes.numel()


@pytest.mark.parametrize(
    ("rows", "layer", "gflop", "megabytes", "ternary_megabytes", "us_bf16", "us_int8"),
    [
        (512, "qkv", 4.1, 12.7, 5.1, 5.1, 2.1),
        (4096, "fc2", 43, 58, 30, 54, 22),
        (32768, "qkv", 261, 310, 265, 327, 132),
        (32768, "fc1", 348, 388, 341, 436, 176),
        (32768, "fc2", 348, 388, 228, 436, 176),
    ],
)
def test_the_design_table_of_layers(
    rows: int,
    layer: str,
    gflop: float,
    megabytes: float,
    ternary_megabytes: float,
    us_bf16: float,
    us_int8: float,
) -> None:
    """PERFORMANCE.md, section b: 3.0 TB/s, bf16 at 798 and int8 at 1979 TOPS, rounded there."""
    product = Product(rows, *XL.linears()[layer])
    assert product.operations / 1e9 == pytest.approx(gflop, rel=0.02)
    assert product.full_precision_bytes / 1e6 == pytest.approx(megabytes, rel=0.02)
    assert product.ternary_bytes / 1e6 == pytest.approx(ternary_megabytes, rel=0.03)
    dense, _ = least_seconds(product.full_precision_bytes, product.operations, 3e12, 798e12)
    ternary, _ = least_seconds(product.ternary_bytes, product.operations, 3e12, 1979e12)
    assert dense * 1e6 == pytest.approx(us_bf16, rel=0.02)
    assert ternary * 1e6 == pytest.approx(us_int8, rel=0.025)


def test_quantization_bytes_by_hand() -> None:
    # bf16 in, int8 out and 12 bytes a token: 38 us of 32,768 rows at 3 TB/s, as designed
    plain = Quantization(32768, 1152)
    assert plain.bytes_moved == 32768 * (2304 + 1152 + 12)
    assert plain.bytes_moved / 3e12 == pytest.approx(38e-6, rel=0.01)
    with_residual = Quantization(32768, 1152, has_residual=True)
    assert with_residual.bytes_moved / 3e12 == pytest.approx(88e-6, rel=0.01)
    grouped = Quantization(2, 1152, groups=28, rank=16)
    assert grouped.bytes_moved == 2 * (2304 + 28 * (1152 + 12 + 4 * 16)) + 2 * 28 * 16 * 1152


def test_the_low_rank_branch_by_hand() -> None:
    fc1 = Product(32768, 1152, 4608, rank=16)
    assert fc1.branch_operations == 2 * 32768 * 16 * 4608
    without = Product(32768, 1152, 4608)
    assert without.branch_operations == 0
    # float32 branch of the tokens, bf16 factor of the outputs
    assert fc1.ternary_bytes - without.ternary_bytes == 4 * 16 * 32768 + 2 * 16 * 4608
    tokens = Quantization(32768, 1152, rank=16)
    assert tokens.branch_operations == 2 * 32768 * 1152 * 16
    plain = Quantization(32768, 1152)
    assert tokens.bytes_moved - plain.bytes_moved == 4 * 16 * 32768 + 2 * 16 * 1152


def test_a_step_with_branches_takes_their_bytes_and_operations() -> None:
    plain, branched = (end_to_end(XL, 128, "int8", rank=rank) for rank in (0, 16))
    # Of 28 blocks: four passes write 64 bytes a token more, at 2.6 TB/s
    written = 28 * 4 * 32768 * 4 * 16 / 2.6e12
    assert branched["elementwise_s"] - plain["elementwise_s"] == pytest.approx(written)
    assert branched["products_s"] > plain["products_s"]
    assert end_to_end(XL, 128, "bf16", rank=16) == end_to_end(XL, 128, "bf16")


def test_what_limits() -> None:
    assert least_seconds(6e12, 1.0, 3e12, 1e12) == (2.0, "memory")
    assert least_seconds(1.0, 4e12, 3e12, 1e12) == (4.0, "compute")


def test_the_published_end_to_end_table() -> None:
    """PERFORMANCE.md, section b; its values are rounded to two figures."""
    expected = {  # images: gemm, elementwise, attention, adaLN, total, W1.58A8, ratio, TF32, FP32
        1: (0.69, 0.21, 0.07, 0.15, 1.12, 0.78, 1.45, 2.3, 12),
        2: (1.23, 0.24, 0.07, 0.15, 1.69, 1.05, 1.61, 2.8, 16),
        16: (6.7, 1.6, 0.45, 0.15, 8.9, 5.6, 1.60, 2.9, 17),
        128: (45.7, 13.0, 3.6, 0.15, 62.5, 40.2, 1.56, 2.8, 16),
    }
    rows = end_to_end_rows(XL, list(expected))
    for row, values in zip(rows, expected.values(), strict=True):
        assert row["basis"] == "model, not measured"
        assert row["tokens"] == 256 * row["images"]
        found = [row[f"bf16_{part}_ms"] for part in ("products", "elementwise", "attention",
                                                     "modulation", "total")]  # fmt: skip
        found += [row["w1.58a8_total_ms"], row["ratio_to_bf16"]]
        found += [row["ratio_to_tf32"], row["ratio_to_fp32"]]
        assert found == pytest.approx(values, rel=0.03)
        assert row["ratio_to_bf16"] == pytest.approx(values[6], abs=0.006)
    large = rows[-1]
    assert large["w1.58a8_products_ms"] == pytest.approx(24.8, abs=0.05)
    assert large["w1.58a8_elementwise_ms"] == pytest.approx(11.8, abs=0.05)


def test_parts_add_up_and_grow() -> None:
    for precision in ("bf16", "int8", "tf32", "fp32"):
        small, large = (end_to_end(XL, images, precision) for images in (1, 64))
        parts = [seconds for part, seconds in small.items() if part != "total_s"]
        assert small["total_s"] == pytest.approx(sum(parts))
        assert small["total_s"] < large["total_s"] < 64 * small["total_s"]


def test_data_sheets_are_dense_peaks_with_a_source() -> None:
    h100 = DATA_SHEETS[0]
    assert (h100.bytes_s, round(h100.bf16 / 1e12), round(h100.int8 / 1e12)) == (3.35e12, 989, 1979)
    for peaks in DATA_SHEETS:
        assert "dense" in peaks.source
        assert peaks.int8 >= 1.99 * peaks.bf16
