"""Which values of a Llama's configuration the models here implement; any other is refused, by name."""

from collections.abc import Iterable
from typing import Any

from train.model_settings import fixed_faults, multiple_faults

ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Those whose angles depend on a token's position alone; under `dynamic` and `longrope` samples of a pack would change
one another's."""

LLM_FIXED = {"hidden_act": "silu", "attention_dropout": 0.0}


def llm_faults(config: Any, **fixed: Any) -> list[str]:
    """What a Llama's configuration asks for in vain; `fixed` adds to the keys that have one possible value."""
    faults = fixed_faults(vars(config), LLM_FIXED | fixed)
    rope = config.rope_parameters or {}
    if rope.get("rope_type") not in ROPE_TYPES:
        faults.append(f"rope_scaling's type is {rope.get('rope_type')!r}, where only {_listed(ROPE_TYPES)} are known")
    faults += fixed_faults(rope, {"partial_rotary_factor": 1.0})
    faults += multiple_faults(config.num_attention_heads, num_key_value_heads=config.num_key_value_heads)
    if getattr(config, "quantization_config", None):
        faults.append("quantization_config is set, where weights are floats; take the model as it was before")
    if config.is_heterogeneous:
        faults.append("per_layer_config is set, where all layers are alike")
    return faults


def _listed(values: Iterable[str]) -> str:
    return ", ".join(map(repr, values))
