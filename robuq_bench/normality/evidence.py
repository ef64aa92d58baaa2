"""Tables that need single tokens rather than summaries: bounds, decay, projections, examples.

Real tokens are a subject's calibration tokens (`probes`), every layer, over all timesteps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from scipy.stats import norm
from torch import Tensor

from robuq_bench import seeds
from robuq_bench.hadamard.transform import is_supported
from robuq_bench.normality.analysis import REFERENCE_SETTINGS, TESTS, analyse
from robuq_bench.normality.berry_esseen import (
    best_multivariate_bound,
    channel_lyapunov,
    decay_slope,
    informative_coordinates,
    is_void,
    lyapunov_coefficient,
    monte_carlo_check,
    multivariate_bound,
)
from robuq_bench.normality.capture import Captured
from robuq_bench.normality.consequence import BITS, REFERENCE
from robuq_bench.normality.controls import CONTROL_NAMES, control_tokens
from robuq_bench.normality.intervals import rejected_share
from robuq_bench.normality.names import TRANSFORMS
from robuq_bench.normality.sign_sums import distance_of_signs, exact_distance
from robuq_bench.normality.statistics import shapiro_wilk
from robuq_bench.normality.summaries import Row, effect_sizes
from robuq_bench.normality.transforms import NotApplicable, make_transform
from robuq_bench.progress import Progress
from robuq_bench.quantization.convert import layer_type

DECAY_CONTROLS = ("gaussian", "laplace", "lognormal", "student-t3")
DECAY_WIDTHS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4608)
COORDINATES = (1, 2, 4, 8)
NULL_TOKENS = 2000
ROTATIONS = ("hadamard", "randomized-hadamard")
EXAMPLE_QUANTILES = 160
EXAMPLE_BINS = 41


class Options(Protocol):
    """The settings read here; see `studies/normality/settings.py`."""

    @property
    def alpha(self) -> float: ...
    @property
    def control_tokens(self) -> int: ...
    @property
    def control_widths(self) -> tuple[int, ...]: ...
    @property
    def bound_tokens(self) -> int: ...
    @property
    def bound_draws(self) -> int: ...
    @property
    def decay_tokens(self) -> int: ...


def evidence_tables(
    probes: Mapping[str, Captured], options: Options, seed: int, progress: Progress
) -> dict[str, list[Row]]:
    """All tables of this module by name, in a fixed order."""
    first = next(iter(probes.values()))
    steps: dict[str, Callable[[], list[Row]]] = {
        "controls": lambda: control_rows(options, seed),
        "channels": lambda: [r for s, p in probes.items() for r in channel_rows(s, p)],
        "bound": lambda: [r for s, p in probes.items() for r in bound_rows(s, p, options, seed)],
        "multivariate": lambda: multivariate_rows(first),
        "decay": lambda: decay_rows(first, options.decay_tokens, seed),
        "projections": lambda: projection_rows(first, options.alpha, seed),
        "sample_size": lambda: sample_size_rows(first, options.alpha, seed),
        "examples": lambda: [r for s, p in probes.items() for r in example_rows(s, p, seed)],
    }
    tables: dict[str, list[Row]] = {}
    with progress.task("evidence", len(steps)) as task:
        for name, make in steps.items():
            task.update(name)
            tables[name] = make()
            task.advance()
    return tables | {"decay_slopes": slope_rows(tables["decay"])}


def by_type(captured: Captured) -> dict[tuple[str, int], Tensor]:
    """Finite, not constant tokens [T, width] float32 of every layer type and width."""
    groups: dict[tuple[str, int], list[Tensor]] = {}
    for layer, part in captured.items():
        x = part.tokens.float()
        x = x[torch.isfinite(x).all(1) & (x.amax(1) > x.amin(1))]
        groups.setdefault((layer_type(layer), x.shape[1]), []).append(x)
    pooled = {key: torch.cat(parts) for key, parts in groups.items()}
    return {key: x for key, x in pooled.items() if len(x)}


def control_rows(options: Options, seed: int) -> list[Row]:
    """Tokens of known distribution under every transform that applies: what the tests can see."""
    rows = []
    for width in options.control_widths:
        # Wide tokens cost most and vary least.
        count = max(16, min(options.control_tokens, options.control_tokens * 576 // width))
        for name in CONTROL_NAMES:
            tokens = control_tokens(name, count, width, seed)
            calibration = control_tokens(
                name, 64, width, seeds.seeded("normality/calibration", seed)
            )
            for transform in TRANSFORMS:
                if transform == "dual-rotation" and width > 1152:
                    continue
                try:
                    rotate = make_transform(
                        transform, width, layer=name, seed=seed, calibration=calibration
                    )
                except NotApplicable:
                    continue
                table = analyse(tokens, torch.arange(count), rotate, seed, REFERENCE_SETTINGS)
                valid = table.valid
                row: Row = {
                    "control": name,
                    "width": width,
                    "transform": transform,
                    "n": table.n,
                    "tokens": count,
                    "degenerate": int((~valid).sum()),
                    "alpha": options.alpha,
                    "seed": seed,
                }
                if valid.any():
                    row |= effect_sizes(table)
                    # Infinite where most entries are equal; the column stays empty.
                    negentropy = np.median(table.column("negentropy")[valid])
                    row["negentropy_median"] = _finite_or_none(float(negentropy))
                    for test, column in TESTS.items():
                        p = table.column(column)[valid]
                        row[f"{test}_rejected"] = rejected_share(p, options.alpha).raw
                    for bits in BITS:
                        ratio = table.column(f"{REFERENCE}/{bits}")[valid]
                        row[f"ratio_{bits}"] = float(ratio.mean())
                rows.append(row)
    return rows


def channel_rows(subject: str, captured: Captured) -> list[Row]:
    """Lyapunov ratio over tokens per channel: all that plain Hadamard has, if channels agree.

    `dependence` compares the variance of plain-Hadamard coordinates over tokens with what
    independent channels would give (1): the root mean square relative difference.
    """
    rows = []
    for layer, part in captured.items():
        x = part.tokens.double()
        if len(x) < 2 or not torch.isfinite(x).all() or not is_supported(x.shape[1]):
            continue
        plain = make_transform("hadamard", x.shape[1])(x)
        expected = x.var(0, correction=0).mean()
        ratio = plain.var(0, correction=0) / expected
        rows.append(
            {
                "subject": subject,
                "layer": layer,
                "layer_type": layer_type(layer),
                "width": x.shape[1],
                "tokens": len(x),
                "channel_lyapunov": channel_lyapunov(x),
                "token_l3_median": float(lyapunov_coefficient(x).nanmedian()),
                "dependence": float((ratio - 1).square().mean().sqrt()),
            }
        )
    return rows


def bound_rows(subject: str, captured: Captured, options: Options, seed: int) -> list[Row]:
    """Berry-Esseen bound, exact distance and its Monte-Carlo check, token by token."""
    rows = []
    groups = by_type(captured)
    share = max(1, options.bound_tokens // len(groups))
    for (kind, width), tokens in groups.items():
        picked = _spread(tokens, share)
        check = monte_carlo_check(picked, options.bound_draws, options.alpha, seed)
        l3 = lyapunov_coefficient(picked)
        for i, token in enumerate(picked):
            exact = distance_of_signs(token)
            rows.append(
                {
                    "subject": subject,
                    "layer_type": kind,
                    "width": width,
                    "l3": float(l3[i]),
                    "bound": float(check.bound[i]),
                    "void": bool(is_void(check.bound[i])),
                    "exact_distance": exact.value,
                    "exact_error": exact.error,
                    "exact_method": exact.method,
                    "measured_distance": float(check.distance[i]),
                    "dkw_slack": check.slack,
                    "violated": bool(check.violated[i]),
                    "draws": options.bound_draws,
                    "alpha": options.alpha,
                    "seed": seed,
                }
            )
    return rows


def multivariate_rows(captured: Captured) -> list[Row]:
    """Raic's bound for k coordinates at once, and the width a flat token would need for it."""
    rows = []
    for (kind, width), tokens in by_type(captured).items():
        if not is_supported(width):
            continue
        picked = _spread(tokens, 4)
        informative = max(informative_coordinates(token) for token in picked)
        for k in COORDINATES:
            bounds = [multivariate_bound(token, k) for token in picked]
            least = best_multivariate_bound(1, k)
            rows.append(
                {
                    "layer_type": kind,
                    "width": width,
                    "k": k,
                    # A singular covariance has no finite bound; the column stays empty.
                    "bound_median": _finite_or_none(float(np.median(bounds))),
                    "bound_of_flat_token": best_multivariate_bound(width, k),
                    "width_needed": int(np.ceil(least**2)),
                    "largest_informative_k": informative,
                }
            )
    return rows


def decay_rows(captured: Captured, count: int, seed: int) -> list[Row]:
    """Exact distance against the width: random parts of `count` real tokens, synthetic tokens."""
    generator = seeds.generator("normality/decay", seed)
    rows = []

    def add(source: str, width: int, tokens: Tensor) -> None:
        found = np.array([exact_distance(token) for token in tokens])
        values = found[np.isfinite(found)]
        if len(values):
            rows.append(
                {
                    "source": source,
                    "width": width,
                    "tokens": len(values),
                    "not_computable": len(found) - len(values),
                    "exact_distance_median": float(np.median(values)),
                    "l3_median": float(lyapunov_coefficient(tokens).median()),
                }
            )

    for (kind, full), tokens in by_type(captured).items():
        picked = _spread(tokens, count)
        for width in [w for w in DECAY_WIDTHS if w < full] + [full]:
            index = torch.stack([torch.randperm(full, generator=generator)[:width] for _ in picked])
            parts = picked.gather(1, index)
            add(f"real {kind}", width, parts[parts.abs().amax(1) > 0])
    for name in DECAY_CONTROLS:
        for width in DECAY_WIDTHS:
            add(name, width, control_tokens(name, count, width, seed))
    return rows


def slope_rows(decay: list[Row]) -> list[Row]:
    """Log-log slope of the distance and of L3 over the width, per source, with intervals."""
    rows = []
    for source in dict.fromkeys(row["source"] for row in decay):
        own = [row for row in decay if row["source"] == source]
        if len(own) < 3:
            continue
        widths = [row["width"] for row in own]
        distance = decay_slope(widths, [row["exact_distance_median"] for row in own])
        l3 = decay_slope(widths, [row["l3_median"] for row in own])
        rows.append(
            {
                "source": source,
                "widths": len(own),
                "slope": distance.slope,
                "low": distance.low,
                "high": distance.high,
                "l3_slope": l3.slope,
                "agrees_with_minus_half": distance.agrees_with(-0.5),
                "agrees_with_minus_one": distance.agrees_with(-1.0),
            }
        )
    return rows


def projection_rows(captured: Captured, alpha: float, seed: int) -> list[Row]:
    """Cramer-Wold: random projections of pairs and of 8 coordinates, beside Gaussian tokens."""
    generator = seeds.generator("normality/projections", seed)
    rows = []
    for (kind, width), tokens in by_type(captured).items():
        if not is_supported(width):
            continue
        y = make_transform("randomized-hadamard", width, layer=kind, seed=seed)(tokens)
        null = control_tokens("gaussian", NULL_TOKENS, width, seed)
        for k in (2, 8):
            if width // k < 8:
                continue
            u = torch.randn(k, generator=generator)
            u /= u.norm()
            shares = []
            for sample in (y, null):
                projected = sample[:, : width // k * k].view(len(sample), -1, k) @ u
                w, p = shapiro_wilk(projected)
                good = np.isfinite(p)
                shares.append((rejected_share(p[good], alpha).raw, float(np.median(w[good]))))
            rows.append(
                {
                    "layer_type": kind,
                    "width": width,
                    "k": k,
                    "n": width // k,
                    "tokens": len(y),
                    "alpha": alpha,
                    "seed": seed,
                    "rejected": shares[0][0],
                    "rejected_null": shares[1][0],
                    "shapiro_w_median": shares[0][1],
                    "shapiro_w_null": shares[1][1],
                }
            )
    return rows


def sample_size_rows(captured: Captured, alpha: float, seed: int) -> list[Row]:
    """Share of tokens that Shapiro-Wilk rejects when it sees n of their coordinates."""
    generator = seeds.generator("normality/sample sizes", seed)
    rows = []
    for (kind, width), tokens in by_type(captured).items():
        samples = {"identity": tokens}
        for name in ROTATIONS if is_supported(width) else ():
            samples[name] = make_transform(name, width, layer=kind, seed=seed)(tokens)
        samples["gaussian null"] = control_tokens("gaussian", NULL_TOKENS, width, seed)
        sizes = [n for n in (16, 32, 64, 128, 256, 512, 1152, 2304) if n < width]
        for n in [*sizes, min(width, 5000)]:
            index = torch.randperm(width, generator=generator)[:n]
            for name, sample in samples.items():
                _, p = shapiro_wilk(sample[:, index])
                good = p[np.isfinite(p)]
                if len(good):
                    rows.append(
                        {
                            "layer_type": kind,
                            "width": width,
                            "sample": name,
                            "n": n,
                            "tokens": len(good),
                            "alpha": alpha,
                            "seed": seed,
                            "rejected": rejected_share(good, alpha).raw,
                        }
                    )
    return rows


def example_rows(subject: str, captured: Captured, seed: int) -> list[Row]:
    """Q-Q points and histogram of one token per layer type, before and after; in units of sigma.

    The token is the one with the median L3 of its type: neither the best nor the worst.
    """
    rows: list[Row] = []
    for (kind, width), tokens in by_type(captured).items():
        l3 = lyapunov_coefficient(tokens)
        token = tokens[l3.argsort()[len(l3) // 2]][None]
        views = {"identity": token}
        for name in ROTATIONS if is_supported(width) else ():
            views[name] = make_transform(name, width, layer=kind, seed=seed)(token)
        for name, view in views.items():
            x = view[0].double().numpy()
            z = np.sort((x - x.mean()) / x.std())
            key = {"subject": subject, "layer_type": kind, "width": width, "transform": name}
            shares = (np.arange(EXAMPLE_QUANTILES) + 0.5) / min(EXAMPLE_QUANTILES, width)
            shares = shares[shares < 1]
            for share, value in zip(shares, np.quantile(z, shares), strict=True):
                point = {"kind": "quantile", "x": float(norm.ppf(share)), "y": float(value)}
                rows.append({**key, **point})
            reach = max(4.0, float(np.abs(z).max()))
            edges = np.linspace(-reach, reach, EXAMPLE_BINS + 1)
            density, _ = np.histogram(z, edges, density=True)
            for left, right, height in zip(edges[:-1], edges[1:], density, strict=True):
                bar = {"kind": "density", "x": float((left + right) / 2), "y": float(height)}
                rows.append({**key, **bar})
    return rows


def _spread(tokens: Tensor, count: int) -> Tensor:
    """`count` tokens evenly spread over the rows, so over layers and timesteps."""
    index = torch.linspace(0, len(tokens) - 1, min(count, len(tokens))).round().long()
    return tokens[index.unique()]


def _finite_or_none(value: float) -> Any:
    return value if np.isfinite(value) else None
