"""What a run's config says, read from its settings and never from the plan's name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

FULL_PRECISION = "full precision"
AMPN = "rotation, AMPN bits"
UNIFORM = "rotation, uniform bits"
PARTIAL = "rotation of some layers"
UNROTATED = "no rotation"
FROM_FILE = "rotation, bits from a file"
FAMILIES = (FULL_PRECISION, AMPN, FROM_FILE, UNIFORM, PARTIAL, UNROTATED)


def is_full_precision(plan: Mapping[str, Any]) -> bool:
    parts = ("weights", "activations")
    return all(section(plan, part).get("quantizer", "none") == "none" for part in parts)


def family(plan: Mapping[str, Any]) -> str:
    """The kind of plan, read from its settings and never from its name."""
    rotation = section(plan, "rotation")
    if is_full_precision(plan):
        return FULL_PRECISION
    if rotation.get("kind", "none") == "none":
        return UNROTATED
    if list(rotation.get("layers", ["*"])) != ["*"]:
        return PARTIAL
    method = section(plan, "allocation").get("method", "uniform")
    return {"ampn": AMPN, "file": FROM_FILE}.get(method, UNIFORM)


def activation_bits(plan: Mapping[str, Any]) -> float | None:
    """Nominal activation bits of the allocatable layers; None when not quantized or per file."""
    activations, allocation = section(plan, "activations"), section(plan, "allocation")
    if activations.get("quantizer", "none") == "none" or allocation.get("method") == "file":
        return None
    if allocation.get("method") == "ampn":
        return float(allocation["mean_bits"])
    return float(activations["bits"])


def recipe(plan: Mapping[str, Any]) -> dict[str, str]:
    """How a plan quantizes, one entry per part; "full precision" where it does not."""
    weights, activations = section(plan, "weights"), section(plan, "activations")
    rotation, allocation = section(plan, "rotation"), section(plan, "allocation")
    adaln, matmul = section(plan, "adaln"), section(plan, "attention").get("matmul_bits", "none")
    kind, layers = rotation.get("kind", "none"), list(rotation.get("layers", ["*"]))
    bits = {
        "ampn": f"AMPN, mean {allocation.get('mean_bits')}",
        "file": "from a file",
    }.get(allocation.get("method", "uniform"), f"{activations.get('bits')} everywhere")
    adaln_bits = adaln.get("activation_bits", "none")
    return {
        "weights": _precision(weights.get("quantizer")),
        "activations": _precision(activations.get("quantizer")),
        "activation bits": "full precision" if is_full_precision(plan) else bits,
        "rotation": kind if layers == ["*"] else f"{kind} on {', '.join(layers)}",
        "low-rank branch": f"rank {section(plan, 'low_rank').get('rank', 0)}",
        "adaLN": f"{_precision(adaln.get('weight_quantizer'))}, "
        + ("activations full precision" if adaln_bits == "none" else f"A{adaln_bits}"),
        "attention products": "full precision" if matmul == "none" else f"{matmul} bits",
    }


def section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = config.get(name, {})
    return value if isinstance(value, Mapping) else {}


def differences(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """For configs of one name, the settings that tell each from the others ("" if alone)."""
    flat = [flatten(config) for config in configs]
    texts = []
    for own in flat:
        rivals = [other for other in flat if other.get("name") == own.get("name")]
        every = {key for other in rivals for key in other}
        keys = sorted(k for k in every if len({_plain(other.get(k)) for other in rivals}) > 1)
        texts.append(", ".join(f"{key} = {_plain(own.get(key))}" for key in keys))
    return texts


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _plain(value: object) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(map(str, value)) + "]"
    return "not set" if value is None else str(value)


def _precision(quantizer: object) -> str:
    return "full precision" if quantizer in (None, "none") else str(quantizer)
