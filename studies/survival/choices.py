"""The design choices whose survival is asked, and the arms that are trained for them.

A choice is a pair of arms: `--set` texts on top of the plan of the run (`--plan`), with what is
chosen and without. `layers.*.` stands for every rule of the plan that quantizes; an activation
keeps the bits of its rule. To add a choice is to add a line. Equal arms are trained once.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from robuq_bench.config.overrides import apply_overrides
from robuq_bench.config.plan import Plan
from robuq_bench.errors import UsageError

Arm = tuple[str, ...]
"""`--set` texts; the empty arm is the plan as it is."""


class Choice(NamedTuple):
    """What `chosen` has and `other` lacks; `label` in at most 20 characters, for the figure."""

    name: str
    label: str
    chosen: Arm = ()
    other: Arm = ()


UNROTATED = "layers.*.rotation=none"
MINMAX = "layers.*.activation=minmax"
GPTQ, RTN = (f"layers.*.weight={{method='{name}', bits=2}}" for name in ("gptq", "rtn"))
DENOISING = ("train.distillation_weight=0.0", "train.denoising_weight=1.0")
CHOICES = (
    Choice("hadamard", "Hadamard", other=(UNROTATED,)),
    Choice("random-signs", "random signs", other=("layers.*.rotation=hadamard",)),
    Choice("gaussian-step", "Gaussian step", other=(MINMAX,)),
    Choice("gaussian-unrotated", "Gaussian, unrotated", (UNROTATED,), (UNROTATED, MINMAX)),
    Choice("centring", "static centring", ("layers.block.centring=mean",)),
    Choice("branch", "SVD branch", other=("layers.*.branch=none",)),
    Choice("scale-per-row", "ternary per row", other=("layers.*.weight=ternary-absmean",)),
    Choice("best-threshold", "best threshold", ("layers.*.weight=ternary-optimal",)),
    Choice("mid-rise", "mid-rise grid", ("layers.*.activation=robust-midrise",)),
    Choice("lloyd-max", "Lloyd–Max levels", ("layers.*.activation=lloyd-max",)),
    Choice("fp-attention", "attention in fp", ("attention.matmul_bits=none",)),
    Choice("smooth", "SmoothQuant", ("layers.*.scaling=smooth",)),
    Choice("gptq", "GPTQ start, W2", (GPTQ,), (RTN,)),
    Choice("distillation", "distillation", other=DENOISING),
)
NAMES = tuple(choice.name for choice in CHOICES)


def chosen(names: Sequence[str]) -> list[Choice]:
    """The choices of these names, in the order of the table."""
    return [choice for choice in CHOICES if choice.name in names]


def arms_of(choices: Sequence[Choice]) -> list[Arm]:
    """Every arm that these choices need, once, the plan as it is first where one does."""
    return sorted(dict.fromkeys(arm for c in choices for arm in (c.chosen, c.other)), key=bool)


def arm_name(arm: Arm) -> str:
    """What an arm is called in tables and keys."""
    return "; ".join(arm) or "reference"


def overrides_of(plan: Plan, arm: Arm) -> list[str]:
    """The arm's texts for this plan, as `--set` takes them."""
    texts: list[str] = []
    for text in arm:
        if not text.startswith("layers.*."):
            texts.append(text)
            continue
        for rule in plan.layers:
            if not rule.slots():
                continue
            own = text.replace("layers.*.", f"layers.{rule.name}.")
            texts.append(own)
            if re.match(r"layers\.\*\.activation=", text) and rule.activation is not None:
                texts.append(f"layers.{rule.name}.activation.bits={rule.activation.bits}")
    return texts


def plan_of(plan: Plan, arm: Arm, study: str) -> Plan:
    """The plan of an arm.

    Raises:
        ConfigError: the plan has no such rule, or its bits are none that the method takes.
    """
    parts = {"plan": plan.model_dump(mode="json"), "workload": {}}
    apply_overrides(parts, study, overrides_of(plan, arm))
    return Plan.model_validate(parts["plan"])


def check_choices(plan: Plan, choices: Sequence[Choice], study: str) -> None:
    """Refuse a plan with which a choice says nothing.

    Raises:
        UsageError: the plan allocates bits itself, or has both arms of a choice alike.
    """
    if plan.bits is not None or plan.is_full_precision:
        raise UsageError(
            f"study {study} compares plans at the same bits in every layer, and plan {plan.name!r} "
            f"{'allocates its own' if plan.bits else 'quantizes nothing'}; name another, such as "
            "--plan a2-uniform"
        )
    for choice in choices:
        if plan_of(plan, choice.chosen, study) == plan_of(plan, choice.other, study):
            raise UsageError(
                f"choice {choice.name!r} changes nothing in plan {plan.name!r}; leave it out of "
                f"{study}.choices, or name a plan that has what it takes away"
            )
