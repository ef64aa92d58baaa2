"""Token tables and summaries: against direct computation, SciPy and statsmodels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from statsmodels.stats.multitest import multipletests

from robuq_bench.normality.analysis import (
    MAX_TESTED,
    TokenTable,
    analyse,
    draw_errors,
    null_table,
)
from robuq_bench.normality.consequence import Setting, error_ratios
from robuq_bench.normality.judgements import judgement_rows, verdicts
from robuq_bench.normality.summaries import (
    Cell,
    Settings,
    block_of,
    cell_rows,
    error_rows,
    lyapunov_rows,
    sign_draw_fields,
    type_rows,
)
from robuq_bench.normality.transforms import drawn_transforms, make_transform

SETTINGS = Settings(alpha=0.05, draws=400, seed=0)
IMAGES = torch.arange(20).repeat_interleave(5)


def gaussian(seed: int, n: int = 144) -> torch.Tensor:
    return torch.randn(100, n, generator=torch.Generator().manual_seed(seed))


def cell(tokens: torch.Tensor, layer: str = "blocks.0.attn.qkv", timestep: int = 50) -> Cell:
    table = analyse(tokens, IMAGES, lambda x: x)
    return Cell("teacher", layer, timestep, "identity", tokens.shape[1], table)


def summarise(cells: list[Cell]) -> dict[str, list[dict[str, Any]]]:
    null = {cells[0].table.n: null_table(cells[0].width, 300, torch.float32, 9)}
    rows = {"cells": cell_rows(cells, SETTINGS), "types": type_rows(cells, null, SETTINGS)}
    rows["errors"] = error_rows(cells, null, SETTINGS)
    rows["judgements"] = judgement_rows(rows["errors"], rows["cells"])
    return rows


def test_columns_are_the_statistics_of_the_transformed_tokens() -> None:
    tokens = gaussian(0)
    table = analyse(tokens, IMAGES, lambda x: 3 * x + 1)
    y = (3 * tokens + 1).double().numpy()
    assert table.column("shapiro_w")[7] == pytest.approx(stats.shapiro(y[7]).statistic, abs=1e-6)
    assert table.column("excess_kurtosis")[7] == pytest.approx(stats.kurtosis(y[7]), abs=1e-5)
    assert table.column("dc_share")[7] == pytest.approx(y[7, 0] ** 2 / (y[7] ** 2).sum())
    assert table.valid.all()
    assert table.n == 144


def test_half_precision_is_measured_in_float32() -> None:
    tokens = gaussian(0).half()
    a = analyse(tokens, IMAGES, lambda x: x)
    b = analyse(tokens.float(), IMAGES, lambda x: x)
    np.testing.assert_array_equal(a.values, b.values)


def test_wide_tokens_are_tested_on_a_subsample_and_quantized_whole() -> None:
    tokens = torch.randn(4, MAX_TESTED + 500, generator=torch.Generator().manual_seed(0))
    table = analyse(tokens, torch.arange(4), lambda x: x, seed=1)
    assert table.n == MAX_TESTED
    assert np.isfinite(table.column("shapiro_p")).all()
    again = analyse(tokens, torch.arange(4), lambda x: x, seed=2)
    assert (table.column("shapiro_w") != again.column("shapiro_w")).all()
    np.testing.assert_array_equal(
        table.column("robust-midrise/2"), again.column("robust-midrise/2")
    )


def test_degenerate_tokens_are_counted_and_change_nothing_else() -> None:
    good = gaussian(0)
    bad = good.clone()
    bad[::10] = 0.0
    bad[5, 3] = torch.inf
    rows = summarise([cell(bad)])
    assert rows["types"][0]["degenerate"] == rows["cells"][0]["degenerate"] == 11
    keep = torch.ones(100, dtype=torch.bool)
    keep[::10], keep[5] = False, False
    table = analyse(good[keep], IMAGES[keep], lambda x: x)
    expected = float(np.median(table.column("shapiro_w")))
    assert rows["types"][0]["shapiro_w_median"] == expected
    for table_rows in rows.values():
        for row in table_rows:
            numbers = [v for v in row.values() if isinstance(v, float)]
            assert np.isfinite(numbers).all()


def test_a_layer_that_is_degenerate_on_most_images_has_no_interval() -> None:
    tokens = torch.zeros(100, 144)
    tokens[:10] = gaussian(0)[:10]
    rows = summarise([cell(tokens)])
    assert rows["types"][0]["degenerate"] == 90
    assert rows["types"][0]["images"] == 2
    tokens[10:90] = gaussian(0)[10:90]  # of 18 images, which are enough
    rows = summarise([cell(tokens)])
    images = {row["images"] for row in (*rows["types"], *rows["errors"])}
    assert images == {verdict.n for verdict in verdicts(rows["types"], rows["judgements"])} == {18}
    tokens[10:] = 0.0
    rows = summarise([cell(tokens)])
    assert "shapiro_w_median" not in rows["types"][0]
    assert rows["errors"] == rows["judgements"] == []


def test_normal_tokens_pass_and_laplace_tokens_do_not() -> None:
    normal = summarise([cell(gaussian(0, 1152)), cell(gaussian(1, 1152), timestep=150)])
    judgements = {row["bits"]: row for row in normal["judgements"]}
    assert all(judgements[bits]["verdict"] == "holds" for bits in (1, 2, 3, 4))
    assert judgements[2]["cells"] == 2
    row = normal["types"][0]
    assert row["kl_null_token_low"] < row["kl"] < row["kl_null_token_high"]
    assert row["shapiro_rejected_bh"] <= row["shapiro_rejected"] < 0.12
    torch.manual_seed(0)
    laplace = torch.distributions.Laplace(0.0, 1.0).sample((100, 144))
    heavy = summarise([cell(laplace)])
    assert not any(row["verdict"] == "holds" for row in heavy["judgements"] if row["bits"] > 1)
    assert heavy["types"][0]["shapiro_rejected_bh"] > 0.8
    assert heavy["types"][0]["kl_low"] > 0.01
    kl = heavy["types"][0]["kl"]
    bound = heavy["types"][0]["total_variation_plug_in"]
    assert bound == pytest.approx(min(np.sqrt(kl / 2), np.sqrt(1 - np.exp(-kl))))


def test_the_kl_estimate_approaches_the_true_divergence() -> None:
    """KL(t5 || normal of equal variance) by quadrature, in wide tokens."""
    t = stats.t(5)
    entropy = 0.5 * np.log(2 * np.pi * np.e * t.var())
    truth = entropy - t.entropy()
    rng = np.random.default_rng(0)
    tokens = torch.from_numpy(t.rvs((100, 4608), random_state=rng))
    rows = summarise([cell(tokens)])
    assert rows["types"][0]["kl"] == pytest.approx(float(truth), abs=0.01)


def test_benjamini_hochberg_runs_within_each_layer() -> None:
    quiet, loud = gaussian(0), torch.rand(100, 144)
    cells = [cell(quiet, "blocks.0.attn.qkv"), cell(loud, "blocks.1.attn.qkv")]
    row = summarise(cells)["types"][0]
    shares = []
    for c in cells:
        p = c.table.column("shapiro_p")
        shares.append(multipletests(p, 0.05, method="fdr_bh")[0].mean())
    assert row["shapiro_rejected_bh"] == pytest.approx(np.mean(shares))
    assert row["layers"] == 2


def test_intervals_widen_when_tokens_of_an_image_agree() -> None:
    images = torch.arange(20)[:, None].expand(20, 5).flatten()
    scale = torch.rand(20, generator=torch.Generator().manual_seed(2)).repeat_interleave(5)
    # A mixture weight per image: tokens of one image are alike.
    tokens = gaussian(3) * torch.where(torch.rand(100, 144) < 0.1, 1 + 5 * scale[:, None], 1.0)
    table = analyse(tokens, images, lambda x: x)
    shuffled = TokenTable(table.columns, table.values, np.arange(100), table.n)

    def width(t: TokenTable) -> float:
        row = cell_rows([Cell("s", "blocks.0.fc1", 1, "identity", 144, t)], SETTINGS)[0]
        return float(row["ratio_4_high"] - row["ratio_4_low"])

    assert width(table) > 1.2 * width(shuffled)


def test_the_verdict_is_the_rule_applied_to_the_upper_bound() -> None:
    key = {"subject": "s", "layer_type": "qkv", "width": 144, "transform": "hadamard"}
    error = {
        **key,
        "quantizer": "robust-midrise",
        "bits": 2,
        "ratio": 1.0,
        "low": 0.9,
        "null_ratio": 1.0,
    }
    cells = [
        {**key, "layer": f"l{i}", "timestep": i, "ratio_2": 1 + i, "ratio_2_high": 1.04 + i}
        for i in range(2)
    ]
    (low,) = judgement_rows([{**error, "high": 1.0499}], cells)
    (high,) = judgement_rows([{**error, "high": 1.05}], cells)
    assert low["verdict"] == "holds"
    assert high["verdict"] == "undecided"
    (fails,) = judgement_rows([{**error, "low": 1.05, "high": 1.2}], cells)
    assert fails["verdict"] == "does not hold"
    assert (low["cells_passing"], low["worst_layer"], low["worst_timestep"]) == (0.5, "l1", 1)
    assert judgement_rows([{**error, "quantizer": "lloyd-max", "high": 1.0}], cells) == []


def test_lyapunov_rows_bound_the_coefficient() -> None:
    (row,) = lyapunov_rows([cell(gaussian(0))])
    assert row["l3_least_possible"] < row["l3_q05"] < row["l3_median"] < row["l3_q95"] < 1
    assert row["bound_median"] == pytest.approx(0.56 * row["l3_median"], rel=1e-6)
    assert row["void_share"] == 0
    hot = torch.eye(144)[:100]
    (row,) = lyapunov_rows([cell(hot + 1e-9)])
    assert row["l3_median"] == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("blocks.3.attn.qkv", 3),
        ("transformer_blocks.11.ff.net.2", 11),
        ("final_layer.linear", None),
    ],
)
def test_block_of(name: str, block: int | None) -> None:
    assert block_of(name) == block


def test_sign_draws_are_averaged_and_widen_the_interval() -> None:
    tokens = gaussian(5)
    tokens[:, 7] += 6  # one loud channel, the same in every token: signs decide where it goes
    layer = "blocks.0.attn.proj"
    name = "randomized-hadamard"
    drawn = drawn_transforms(name, 144, layer=layer, seed=3, draws=6)
    draws = draw_errors(tokens, drawn).ratios
    assert draws.shape == (100, 6, 5)
    rotate = make_transform("randomized-hadamard", 144, layer=layer, seed=3)
    alone = error_ratios(rotate(tokens), (Setting("robust-midrise", 2),))
    np.testing.assert_allclose(draws[:, 0, 1], alone[:, 0], rtol=1e-6)  # the plan's own signs
    others = drawn_transforms(name, 144, layer=layer, seed=4, draws=6)
    other = draw_errors(tokens, others).ratios
    assert len({float(mean) for mean in np.hstack([draws, other]).mean(0)[:, 1]}) == 12
    table = analyse(tokens, IMAGES, make_transform("randomized-hadamard", 144, layer=layer, seed=3))
    cell = Cell("s", layer, 50, "randomized-hadamard", 144, table, draws)
    null = {144: null_table(144, 300, torch.float32, 9)}
    rows = {
        row["bits"]: row
        for row in error_rows([cell], null, SETTINGS)
        if row["quantizer"] == "robust-midrise"
    }
    means = draws.mean(0)[:, 1]
    assert rows[2]["ratio"] == pytest.approx(means.mean())
    assert (rows[2]["draws_min"], rows[2]["draws_max"]) == (means.min(), means.max())
    between = stats.ttest_1samp(means, 0).confidence_interval(0.95)
    assert rows[2]["low"] <= between.low < between.high <= rows[2]["high"]
    assert rows[2]["sign_draws"] == 6


@pytest.mark.parametrize("count", [3, 8])
@pytest.mark.parametrize("image_effect", [0.0, 1.0])
def test_the_interval_over_sign_draws_covers_the_mean(count: int, image_effect: float) -> None:
    """Normal effects of 40 images and few draws: about 95 %, where 1.96 errors give 81 to 91 %."""
    rng = np.random.default_rng(0)
    table = TokenTable(("shapiro_w",), np.ones((40, 1)), np.arange(40), 144)
    covered = []
    for seed in range(300):
        of_images = image_effect * rng.standard_normal((40, 1, 5))
        draws = of_images + rng.standard_normal((1, count, 5))
        cell = Cell("s", "blocks.0.fc1", 50, "randomized-hadamard", 144, table, draws)
        fields = sign_draw_fields([cell], Settings(alpha=0.05, draws=200, seed=seed))
        covered += [row["low"] <= 0 <= row["high"] for row in fields.values()]
    # 1500 trials at 95 %: standard error 0.6 %.
    assert 0.93 <= np.mean(covered) <= 0.97
