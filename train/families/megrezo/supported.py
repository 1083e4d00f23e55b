"""Which values of the towers' configurations are implemented; any other is refused, by name."""

from collections.abc import Mapping
from typing import Any

from train.families.megrezo.geometry import pool_factor
from train.model_settings import count_faults, fixed_faults, kind_faults, multiple_faults

VISION_FIXED = {"hidden_act": "gelu_pytorch_tanh", "attention_dropout": 0.0, "num_channels": 3}


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
