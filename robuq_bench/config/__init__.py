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
from robuq_bench.config.older import modern_plan
from robuq_bench.config.overrides import quoted
from robuq_bench.config.plan import (
    AttentionConfig,
    BitsConfig,
    CalibrationConfig,
    Plan,
    Rule,
    TrainConfig,
)
from robuq_bench.config.resolve import (
    Config,
    canonical_json,
    config_for,
    config_from_toml,
    config_hash,
    resolve,
    sensitivity_steps,
    to_toml,
    training_recipe,
    training_steps,
)
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
    "AttentionConfig",
    "BitsConfig",
    "CalibrationConfig",
    "Config",
    "DataConfig",
    "DiffusionConfig",
    "EvaluationConfig",
    "ModelConfig",
    "Plan",
    "Rule",
    "TeacherConfig",
    "TeacherTraining",
    "TrainConfig",
    "TrainingConfig",
    "Workload",
    "asset_path",
    "canonical_json",
    "config_for",
    "config_from_toml",
    "config_hash",
    "load_allocation_file",
    "load_plan",
    "load_workload",
    "modern_plan",
    "plan_names",
    "quoted",
    "resolve",
    "sensitivity_steps",
    "to_toml",
    "training_recipe",
    "training_steps",
    "workload_names",
]
