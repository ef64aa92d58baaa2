"""Plans, workloads and the one frozen `Config` that a run is addressed by.

Imports neither torch nor anything else that is slow, so a typo is answered at once.
"""

from __future__ import annotations

from robuq_bench.config.files import (
    asset_path,
    load_allocation_file,
    load_plan,
    load_workload,
    plan_names,
    workload_names,
)
from robuq_bench.config.plan import (
    ActivationConfig,
    AdaLNConfig,
    AllocationConfig,
    AttentionConfig,
    LayersConfig,
    LowRankConfig,
    Plan,
    QATConfig,
    RotationConfig,
    WeightConfig,
)
from robuq_bench.config.resolve import (
    Config,
    canonical_json,
    config_from_toml,
    config_hash,
    quoted,
    resolve,
    sensitivity_steps,
    to_toml,
)
from robuq_bench.config.studies import AllocationStudyConfig, NormalityConfig, SensitivityConfig
from robuq_bench.config.workload import (
    DataConfig,
    DiffusionConfig,
    EvaluationConfig,
    ModelConfig,
    TeacherConfig,
    TeacherTraining,
    TrainingConfig,
    Workload,
)

__all__ = [
    "ActivationConfig",
    "AdaLNConfig",
    "AllocationConfig",
    "AllocationStudyConfig",
    "AttentionConfig",
    "Config",
    "DataConfig",
    "DiffusionConfig",
    "EvaluationConfig",
    "LayersConfig",
    "LowRankConfig",
    "ModelConfig",
    "NormalityConfig",
    "Plan",
    "QATConfig",
    "RotationConfig",
    "SensitivityConfig",
    "TeacherConfig",
    "TeacherTraining",
    "TrainingConfig",
    "WeightConfig",
    "Workload",
    "asset_path",
    "canonical_json",
    "config_from_toml",
    "config_hash",
    "load_allocation_file",
    "load_plan",
    "load_workload",
    "plan_names",
    "quoted",
    "resolve",
    "sensitivity_steps",
    "to_toml",
    "workload_names",
]
