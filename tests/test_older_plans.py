"""Plans in the schema before rules give every layer what that schema gave it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robuq_bench.config import Plan, modern_plan
from robuq_bench.config.plan import Kind, matches

#: By structure: name and kind, as `select_layers` finds them in our DiT and in diffusers'.
LAYERS: dict[str, Kind] = {
    f"blocks.{i}.{name}": "block"
    for i in range(2)
    for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "ff.net.2", "attn.to_out.0")
}
LAYERS |= {"blocks.0.adaLN_modulation.1": "adaLN", "blocks.1.norm1.linear": "adaLN"}
LAYERS |= {"t_embedder.mlp.0": "other", "final_layer.linear": "other", "x_embedder.proj": "other"}
PATTERNS = st.lists(
    st.sampled_from(
        ["*", "*.proj", "*.fc?", "*qkv", "blocks.0.*", "*adaLN_modulation*", "mlp.*", "*.linear"]
    ),
    max_size=3,
    unique=True,
)
TERNARY = st.sampled_from(["ternary-twn", "ternary-absmean"])
OLD_PLANS = st.fixed_dictionaries(
    {
        "name": st.just("old"),
        "weights": st.fixed_dictionaries({"quantizer": st.just("none") | TERNARY}),
        "activations": st.fixed_dictionaries(
            {
                "quantizer": st.sampled_from(["none", "minmax", "robust-midtread"]),
                "bits": st.integers(1, 8),
            }
        ),
        "rotation": st.fixed_dictionaries(
            {
                "kind": st.sampled_from(["none", "hadamard", "randomized-hadamard"]),
                "layers": PATTERNS,
            }
        ),
        "low_rank": st.fixed_dictionaries(
            {"rank": st.integers(0, 3), "layers": PATTERNS | st.just("none")}
        ),
        "adaln": st.fixed_dictionaries(
            {
                "weight_quantizer": st.just("none") | TERNARY,
                "activation_bits": st.just("none") | st.integers(1, 8),
            }
        ),
        "layers": st.fixed_dictionaries(
            {"skip": PATTERNS, "include": PATTERNS, "adaln": PATTERNS | st.just("none")}
        ),
    }
)


def by_the_old_schema(plan: Any, name: str, kind: Kind) -> dict[str, Any]:
    """The slots of a layer, as the code before rules chose them."""
    layers, adaln = plan["layers"], plan["adaln"]
    if matches(name, layers["skip"]):
        return {}
    if kind == "other" and not matches(name, layers["include"]):
        return {}
    if layers["adaln"] != "none":
        kind = "adaLN" if matches(name, layers["adaln"]) else "block"
    quantizer, bits = plan["activations"]["quantizer"], plan["activations"]["bits"]
    weight = plan["weights"]["quantizer"]
    if weight == quantizer == "none":
        return {}
    if kind == "adaLN":
        weight, bits = adaln["weight_quantizer"], adaln["activation_bits"]
        if weight == "none" and bits == "none":
            return {}
    slots: dict[str, Any] = {}
    if plan["rotation"]["kind"] != "none" and matches(name, plan["rotation"]["layers"]):
        slots["rotation"] = plan["rotation"]["kind"]
    branched = plan["low_rank"]["layers"]
    if plan["low_rank"]["rank"] and (branched == "none" or matches(name, branched)):
        slots["branch"] = plan["low_rank"]["rank"]
    if weight != "none":
        slots["weight"] = weight
    if quantizer != "none" and bits != "none":
        slots["activation"] = (quantizer, bits)
    return slots


def by_its_rules(plan: Plan, name: str, kind: Kind) -> dict[str, Any]:
    rule = plan.rule_for(name, kind)
    if rule is None:
        return {}
    found: dict[str, Any] = {slot: method.method for slot, method in rule.slots().items()}
    if "activation" in found:
        assert rule.activation is not None
        found["activation"] = (found["activation"], rule.activation.bits)
    if "branch" in found:
        found["branch"] = rule.branch.rank  # type: ignore[union-attr]
    assert rule.fixed_bits or not rule.name.startswith("adaln") or not found
    return found


@settings(max_examples=300)
@given(OLD_PLANS)
def test_every_layer_gets_what_the_old_schema_gave_it(old: Any) -> None:
    plan = Plan.model_validate(modern_plan(old))
    for name, kind in LAYERS.items():
        assert by_its_rules(plan, name, kind) == by_the_old_schema(old, name, kind), name


def test_a_plan_of_today_comes_back_as_it_is() -> None:
    values = {"name": "new", "layers": [{"name": "block", "weight": "ternary-twn"}]}
    assert modern_plan(values) == values


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": {"quantiser": "none"}}, r"weights\.quantiser: unknown key; did you mean"),
        ({"weights": 3}, "weights is no table"),
        ({"qat": {}, "layers": []}, "layers is no table"),
        ({"activations": {"bits": 99}}, r"activations\.bits must be 1 to 8, got 99"),
    ],
)
def test_what_the_old_schema_did_not_have_is_refused(change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        modern_plan({"name": "old", "weights": {"quantizer": "ternary-twn"}, **change})


def test_a_pattern_of_two() -> None:
    assert matches("blocks.3.mlp.fc1", ["blocks.3.* & *.fc1"])
    assert not matches("blocks.3.mlp.fc2", ["blocks.3.* & *.fc1"])
    assert not matches("blocks.2.mlp.fc1", ["blocks.3.* & *.fc1"])
    assert matches("module.blocks.3.mlp.fc1", ["nothing", "blocks.3.* & *.fc1"])
