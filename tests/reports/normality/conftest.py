"""Fabricated runs of the normality study: every number is made up, none was measured."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from robuq_bench.config import resolve
from robuq_bench.runs.run import Run

REFERENCE = "robust-midrise"
Tables = dict[str, list[dict[str, Any]]]
Ratios = Mapping[tuple[str, str], tuple[float, float, float]]

TEACHER, EARLY, LATE = "teacher", "a2 after 20 steps", "a2 after 100 steps"
PLACES = {"qkv": 16, "fc2": 32}
BITS = (1, 2, 3, 4, 8)
TRANSFORMS = ("identity", "hadamard", "hadamard-without-dc", "randomized-hadamard", "dual-rotation")
QUANTIZERS = ("robust-midrise", "robust-midtread", "lloyd-max", "minmax", "absmax")
LAYERS = {
    kind: [f"blocks.{b}.{part}.{kind}" for b in (0, 1)]
    for kind, part in zip(PLACES, ("attn", "mlp"), strict=True)
}
TIMESTEPS = (250, 750)
#: (low, ratio, high) of the reference quantizer; what is not named is (0.98, 0.99, 1.0).
RATIOS: Ratios = {
    ("qkv", "identity"): (2.1, 2.2, 2.3),
    ("fc2", "identity"): (1500.0, 1600.25, 1700.0),
    ("qkv", "hadamard"): (1.2, 1.2744, 1.3),
    ("fc2", "hadamard"): (1.04, 1.0491, 1.06),
    ("qkv", "hadamard-without-dc"): (1.2, 1.27, 1.3),
}


@dataclasses.dataclass
class Study:
    """A fabricated run: its folder below `root`, and the tables as they were written."""

    root: Path
    folder: Path
    tables: dict[str, list[dict[str, Any]]]

    def rows(self, table: str, **wanted: object) -> list[dict[str, Any]]:
        return [r for r in self.tables[table] if all(r[k] == v for k, v in wanted.items())]


def made_up_tables(subjects: Sequence[str], ratios: Ratios = RATIOS, seed: int = 0) -> Tables:
    """All tables of the study with the columns it writes; every number is made up."""
    rng = random.Random(seed)
    tables: Tables = {}

    def add(table: str, **row: Any) -> None:
        tables.setdefault(table, []).append(row)

    def ratio_of(kind: str, transform: str) -> tuple[float, float, float]:
        return ratios.get((kind, transform), (0.98, 0.99, 1.0))

    for subject in subjects:
        for kind, width in PLACES.items():
            for transform in TRANSFORMS:
                key = {
                    "subject": subject,
                    "layer_type": kind,
                    "width": width,
                    "transform": transform,
                }
                n = width - (transform == "hadamard-without-dc")
                low, ratio, high = ratio_of(kind, transform)
                no_kl = transform == "dual-rotation"
                shares = {
                    f"{test}_rejected{end}": rng.random()
                    for test in ("shapiro", "anderson", "lilliefors", "dagostino")
                    for end in ("", "_bh", "_null")
                }
                kl = None if no_kl else rng.uniform(-0.02, 0.2)
                add(
                    "types",
                    **key,
                    n=n,
                    layers=2,
                    timesteps=2,
                    images=16,
                    tokens=128,
                    degenerate=3,
                    alpha=0.05,
                    seed=0,
                    shapiro_w_median=rng.uniform(0.5, 1),
                    shapiro_w_q05=0.4321,
                    abs_skewness_median=rng.random(),
                    kurtosis_median=rng.uniform(-1, 3),
                    kl=kl,
                    kl_low=None if no_kl else kl - 0.01,
                    kl_high=None if no_kl else kl + 0.01,
                    kl_null_token_low=-0.0375,
                    kl_null_token_high=0.0396,
                    kl_undefined=7 if no_kl else 0,
                    total_variation_plug_in=None if no_kl else rng.random(),
                    **shares,
                )
                for bits in BITS:
                    add(
                        "verdicts",
                        **key,
                        bits=bits,
                        quantizer=REFERENCE,
                        ratio=ratio,
                        upper_95=high,
                        null_ratio=1.0637 if (bits, width) == (8, 16) else 1.0,
                        cells=4,
                        cells_passing=0.75,
                        normal_enough=high < 1.05,
                        worst_ratio=ratio * 2,
                        worst_layer=LAYERS[kind][1],
                        worst_timestep=750,
                    )
                    for quantizer in QUANTIZERS:
                        if (quantizer, bits) == ("absmax", 1):
                            continue
                        own = (
                            (low, ratio, high)
                            if quantizer == REFERENCE
                            else sorted(rng.random() for _ in range(3))
                        )
                        add(
                            "errors",
                            **key,
                            quantizer=quantizer,
                            bits=bits,
                            ratio=own[1],
                            low=own[0],
                            high=own[2],
                            null_ratio=1.0,
                            tokens=128,
                            images=16,
                        )
                for layer in LAYERS[kind]:
                    for timestep in TIMESTEPS:
                        cell = {
                            "subject": subject,
                            "layer": layer,
                            "layer_type": kind,
                            "block": int(layer.split(".")[1]),
                            "timestep": timestep,
                            "transform": transform,
                            "width": width,
                            "n": n,
                            "tokens": 32,
                            "degenerate": 0,
                            "shapiro_w_median": rng.uniform(0.5, 1),
                        }
                        for bits in BITS:
                            value = ratio * (1 + timestep / 5000)
                            cell |= {
                                f"ratio_{bits}": value,
                                f"ratio_{bits}_low": value - 0.01,
                                f"ratio_{bits}_high": value + 0.01,
                            }
                        add("cells", **cell)
            place = {"subject": subject, "layer_type": kind, "width": width}
            add(
                "lyapunov",
                **place,
                tokens=128,
                l3_least_possible=width**-0.5,
                l3_q05=0.21,
                l3_median=rng.random(),
                l3_q95=0.61,
                bound_median=0.1234567,
                void_share=0.015625,
            )
            for layer in LAYERS[kind]:
                add(
                    "channels",
                    **{**place, "layer": layer},
                    tokens=16,
                    channel_lyapunov=0.2,
                    token_l3_median=0.18,
                    dependence=rng.random(),
                )
            for i in range(6):
                l3 = 0.1 + 0.05 * i
                add(
                    "bound",
                    **place,
                    l3=l3,
                    bound=0.56 * l3,
                    void=False,
                    exact_distance=l3**2 / 30,
                    exact_error=1e-7,
                    exact_method="inversion",
                    measured_distance=0.02,
                    dkw_slack=0.0304,
                    violated=i == 5,
                    draws=2000,
                    alpha=0.05,
                    seed=0,
                )
            for transform in ("identity", "randomized-hadamard"):
                for i in range(9):
                    z = (i - 4) / 2
                    shape = {**place, "transform": transform}
                    add(
                        "examples",
                        **shape,
                        kind="quantile",
                        x=z,
                        y=z * abs(z) if transform == "identity" else z,
                    )
                    add("examples", **shape, kind="density", x=z, y=math.exp(-z * z / 2) / 2.5)
    for kind, width in PLACES.items():
        place = {"layer_type": kind, "width": width}
        for k, needed in ((1, 3364), (2, 34792)):
            add(
                "multivariate",
                **place,
                k=k,
                bound_median=None if k == 2 else 10.8,
                bound_of_flat_token=4.8333,
                width_needed=needed,
                largest_informative_k=0,
            )
            add(
                "projections",
                **place,
                k=k,
                n=width // k,
                tokens=64,
                alpha=0.05,
                seed=0,
                rejected=0.25 if (kind, k) == ("fc2", 2) else 0.05,
                rejected_null=0.049,
                shapiro_w_median=0.928,
                shapiro_w_null=0.955,
            )
        for n in (8, 16):
            for sample, share in (
                ("identity", 0.8),
                ("randomized-hadamard", 0.06),
                ("gaussian null", 0.05),
            ):
                add(
                    "sample_size",
                    **place,
                    sample=sample,
                    n=n,
                    tokens=64,
                    alpha=0.05,
                    seed=0,
                    rejected=share,
                )
        add(
            "skipped",
            transform="block-hadamard-64",
            **place,
            reason=f"needs a multiple of 64, not {width}",
        )
    for source in ("real qkv", "real fc2", "gaussian"):
        for width in (16, 64, 256):
            add(
                "decay",
                source=source,
                width=width,
                tokens=8,
                not_computable=0,
                exact_distance_median=0.2 / width,
                l3_median=width**-0.5,
            )
        add(
            "decay_slopes",
            source=source,
            widths=3,
            slope=-1.0,
            low=-1.1,
            high=-0.9,
            l3_slope=-0.5,
            agrees_with_minus_half=False,
            agrees_with_minus_one=True,
        )
    for control in ("gaussian", "one-hot"):
        for width in (16, 32):
            for transform in ("identity", "hadamard", "randomized-hadamard"):
                hot = control == "one-hot"
                shares = {
                    f"{t}_rejected": 0.97 if hot else 0.047
                    for t in ("shapiro", "anderson", "lilliefors", "dagostino")
                }
                add(
                    "controls",
                    control=control,
                    width=width,
                    transform=transform,
                    n=width,
                    tokens=256,
                    degenerate=0,
                    alpha=0.05,
                    seed=0,
                    shapiro_w_median=0.0572 if hot else 0.9911,
                    kurtosis_median=139.0 if hot else -0.08,
                    negentropy_median=None if hot else 0.06,
                    **shares,
                    **{f"ratio_{b}": 0.0213 if hot and b == 1 else 1.2 for b in BITS},
                )
    return tables


def make_run(root: Path, tables: Tables, seed: int = 0) -> Study:
    config = resolve("normality", "1", "a2", "digits", seed, [])
    with Run.open(root, config, ["bench.py", "study", "normality"]) as run:
        for name, rows in tables.items():
            run.write_table(name, rows)
        run.append("normality/all", kind="normality", subject=TEACHER)
        run.finish()
    return Study(root, run.path, tables)


@pytest.fixture(scope="session")
def made_up() -> SimpleNamespace:
    """The names, tables and runs that tests fabricate."""
    return SimpleNamespace(
        teacher=TEACHER,
        early=EARLY,
        late=LATE,
        bits=BITS,
        layers=LAYERS,
        tables=made_up_tables,
        run=make_run,
    )


@pytest.fixture(scope="session")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """A run of three models; its tables are in the order in which the study writes them."""
    root = tmp_path_factory.mktemp("normality") / "runs"
    return make_run(root, made_up_tables(sorted((TEACHER, EARLY, LATE))))


@pytest.fixture(scope="session")
def html(study: Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of `study`."""
    from reports import build_report

    return build_report([study.root], tmp_path_factory.mktemp("report") / "report.html")


@pytest.fixture(scope="session")
def page(html: Path, parse_page: Callable[[Path], Any]) -> Any:
    """The report of `study`, parsed."""
    return parse_page(html)
