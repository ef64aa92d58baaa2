"""How much a model suffers from the activation bits of one layer: metrics and their agreement.

Every metric maps (quantized model, layers, bit widths, calibration batches) to {layer: {bits:
value}}, higher is more sensitive, and leaves the model as it was found; see `METRICS`.
"""

from robuq_bench.sensitivity.agreement import (
    Agreement,
    Estimate,
    agreement_gain,
    rank_agreement,
    recovered_layers,
    seed_agreement,
)
from robuq_bench.sensitivity.calibration import (
    CalibrationBatch,
    ModelInputs,
    calibration_batches,
    calibration_set,
)
from robuq_bench.sensitivity.curvature import Curvature, fisher, hessian_trace, mean_eigenvalue
from robuq_bench.sensitivity.epsilon import epsilon_mse, measure_sensitivity
from robuq_bench.sensitivity.higgs import LinearFit, higgs, linearity
from robuq_bench.sensitivity.local import LocalErrors, local_errors, output_mse, output_nsr
from robuq_bench.sensitivity.losses import SampleLoss, denoising_loss, distillation_loss
from robuq_bench.sensitivity.metrics import METRICS, Metric, MetricOptions, metric_named
from robuq_bench.sensitivity.timesteps import MetricFunction, by_timestep, timestep_buckets

__all__ = [
    "METRICS",
    "Agreement",
    "CalibrationBatch",
    "Curvature",
    "Estimate",
    "LinearFit",
    "LocalErrors",
    "Metric",
    "MetricFunction",
    "MetricOptions",
    "ModelInputs",
    "SampleLoss",
    "agreement_gain",
    "by_timestep",
    "calibration_batches",
    "calibration_set",
    "denoising_loss",
    "distillation_loss",
    "epsilon_mse",
    "fisher",
    "hessian_trace",
    "higgs",
    "linearity",
    "local_errors",
    "mean_eigenvalue",
    "measure_sensitivity",
    "metric_named",
    "output_mse",
    "output_nsr",
    "rank_agreement",
    "recovered_layers",
    "seed_agreement",
    "timestep_buckets",
]
