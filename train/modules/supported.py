"""Which values of a published configuration the models here implement; any other is refused, by name."""

from collections.abc import Iterable, Mapping
from typing import Any

from train.geometry import pool_factor
from train.settings import count_faults, fixed_faults, kind_faults, multiple_faults

ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Those whose angles depend on a token's position alone; under `dynamic` and `longrope` samples of a pack would change
one another's."""

LLM_FIXED = {"hidden_act": "silu", "attention_dropout": 0.0}
VISION_FIXED = {"hidden_act": "gelu_pytorch_tanh", "attention_dropout": 0.0, "num_channels": 3}


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


def vision_faults(vision: Mapping[str, Any], patch_size: int) -> list[str]:
    """What a vision tower's configuration asks for in vain."""
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "patch_size", "image_size")
    faults = count_faults(vision, sizes) or multiple_faults(
        vision["hidden_size"], num_attention_heads=vision["num_attention_heads"]
    )
    faults += fixed_faults(vision, VISION_FIXED | {"patch_size": patch_size})
    return [f"vision_config.{fault}" for fault in faults]


def audio_faults(audio: Mapping[str, Any], hidden_size: int) -> list[str]:
    """What an audio encoder's configuration asks for in vain."""
    sizes = ("n_mels", "n_ctx", "n_state", "n_head", "n_layer", "output_dim")
    faults = count_faults(audio, sizes) or multiple_faults(audio["n_state"], n_head=audio["n_head"])
    faults += fixed_faults(audio, {"output_dim": hidden_size})
    faults += kind_faults(audio, bool, add_audio_bos_eos_token="true or false")
    told = [f"audio_config.{fault}" for fault in faults]
    try:
        pool_factor(audio["avg_pool"])
    except ValueError as fault:
        told.append(str(fault))
    return told


def _listed(values: Iterable[str]) -> str:
    return ", ".join(map(repr, values))
