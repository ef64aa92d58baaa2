"""The metrics by name, each with its label and source, behind one call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from robuq_bench.errors import UsageError, suggest
from robuq_bench.sensitivity.curvature import PROBES, fisher, hessian_trace
from robuq_bench.sensitivity.epsilon import epsilon_mse
from robuq_bench.sensitivity.higgs import NOISE_LEVELS, higgs
from robuq_bench.sensitivity.local import output_mse, output_nsr
from robuq_bench.sensitivity.losses import SampleLoss
from robuq_bench.sensitivity.timesteps import MetricFunction


@dataclass(frozen=True)
class MetricOptions:
    """What some metrics need besides model, layers, bits and batches.

    Attributes:
        teacher: reference model of `epsilon_mse_teacher`.
        loss: loss of `fisher` and `hessian_trace`.
        seed: of Hessian probes and HIGGS noise.
        probes: Hessian probes per layer and batch.
        noise_levels: of HIGGS.
        on_detail: called with (layer, `Curvature` or `LinearFit`) by `hessian_trace` and `higgs`.
    """

    teacher: nn.Module | None = None
    loss: SampleLoss | None = None
    seed: int = 0
    probes: int = PROBES
    noise_levels: tuple[float, ...] = NOISE_LEVELS
    on_detail: Callable[[str, Any], None] | None = None


@dataclass(frozen=True)
class Metric:
    """One metric: `bind(options)` gives the function that every metric is called by."""

    name: str
    label: str
    source: str
    bind: Callable[[MetricOptions], MetricFunction]


def _teacher(options: MetricOptions) -> nn.Module:
    if options.teacher is None:
        raise UsageError("metric 'epsilon_mse_teacher' needs a teacher to compare with")
    return options.teacher


def _loss(name: str, options: MetricOptions) -> SampleLoss:
    if options.loss is None:
        raise UsageError(f"metric {name!r} needs a loss; see robuq_bench.sensitivity.losses")
    return options.loss


def _bind_hessian(options: MetricOptions) -> MetricFunction:
    return partial(
        hessian_trace,
        loss=_loss("hessian_trace", options),
        probes=options.probes,
        seed=options.seed,
        on_detail=options.on_detail,
    )


def _bind_higgs(options: MetricOptions) -> MetricFunction:
    return partial(
        higgs, noise_levels=options.noise_levels, seed=options.seed, on_detail=options.on_detail
    )


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric(
            "epsilon_mse",
            "end-to-end change of the noise prediction",
            "this suite; RobuQ (arXiv 2509.23582) publishes no formula",
            lambda options: epsilon_mse,
        ),
        Metric(
            "epsilon_mse_teacher",
            "increase of the end-to-end error against the teacher",
            "this suite",
            lambda options: partial(epsilon_mse, reference=_teacher(options)),
        ),
        Metric(
            "output_mse",
            "mean squared error of the layer's own output",
            "AdaRound, arXiv 2004.10568",
            lambda options: output_mse,
        ),
        Metric(
            "output_nsr",
            "noise-to-signal ratio of the layer's own output, 10^(-SQNR/10)",
            "Lin et al. 2016, arXiv 1511.06393",
            lambda options: output_nsr,
        ),
        Metric(
            "fisher",
            "perturbation weighted by squared gradients (diagonal Fisher)",
            "BRECQ, arXiv 2102.05426, equation 10",
            lambda options: partial(fisher, loss=_loss("fisher", options)),
        ),
        Metric(
            "hessian_trace",
            "perturbation weighted by the mean Hessian eigenvalue",
            "HAWQ-V2, arXiv 1911.03852",
            _bind_hessian,
        ),
        Metric(
            "higgs",
            "linearity coefficient times relative perturbation",
            "HIGGS, arXiv 2411.17525",
            _bind_higgs,
        ),
    )
}


def metric_named(name: str) -> Metric:
    """Return a metric of the registry; UsageError for an unknown name."""
    if name not in METRICS:
        raise UsageError(f"unknown sensitivity metric {name!r}{suggest(name, METRICS)}")
    return METRICS[name]
