"""The configuration of Gemma 4 E2B and E4B: the published one, with the values refused that are not implemented."""

from collections.abc import Mapping
from dataclasses import field
from typing import Any

import transformers

from train.model_settings import count_faults, fixed_faults, multiple_faults, refuse, scale_faults

MEL_BINS = 128
"""Of a frame of sound: the first convolution's channels tell the audio tower, so it can have no other number."""

_TEXT_FIXED = {
    "attention_dropout": 0.0,
    "attention_k_eq_v": False,
    "enable_moe_block": False,
    "use_bidirectional_attention": None,
    "hidden_activation": "gelu_pytorch_tanh",
}
_TEXT_SIZES = ("hidden_size_per_layer_input", "sliding_window", "num_hidden_layers")
_VISION_FIXED = {"attention_dropout": 0.0}
_VISION_SIZES = ("hidden_size", "num_hidden_layers", "patch_size", "pooling_kernel_size")
_AUDIO_FIXED = {"attention_context_right": 0}
_AUDIO_SIZES = ("hidden_size", "num_hidden_layers", "attention_chunk_size", "attention_context_left")
_ROPE_TYPES = {"sliding_attention": "default", "full_attention": "proportional"}


class Gemma4Config(transformers.Gemma4Config):
    """The published layout; without arguments its towers are E2B's. CheckpointError names each value that the model
    does not implement.
    """

    vision_config: Any = field(default_factory=dict)
    audio_config: Any = field(default_factory=dict)

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        faults = fixed_faults(vars(self), {"tie_word_embeddings": True})
        faults += [f"text_config.{fault}" for fault in _text_faults(self.text_config)]
        for name, part_faults in (("vision_config", _vision_faults), ("audio_config", _audio_faults)):
            if (part := getattr(self, name)) is None:
                faults.append(f"{name} is missing; take E2B or E4B, which read images and audio")
            else:
                faults += [f"{name}.{fault}" for fault in part_faults(vars(part))]
        refuse(faults)

    @property
    def max_position_embeddings(self) -> int:
        """Tokens of the longest conversation, its answer included."""
        return self.get_text_config().max_position_embeddings


def _text_faults(text: Any) -> list[str]:
    values = vars(text)
    faults = fixed_faults(values, _TEXT_FIXED) + count_faults(values, _TEXT_SIZES)
    if values["final_logit_softcapping"] is not None:
        faults += scale_faults(values, ("final_logit_softcapping",))
    for kind, known in _ROPE_TYPES.items():
        rope = (text.rope_parameters or {}).get(kind) or {}
        faults += [f"rope_parameters.{kind}: {fault}" for fault in fixed_faults(rope, {"rope_type": known})]
    return faults


def _vision_faults(vision: Mapping[str, Any]) -> list[str]:
    return count_faults(vision, _VISION_SIZES) + fixed_faults(vision, _VISION_FIXED)


def _audio_faults(audio: Mapping[str, Any]) -> list[str]:
    faults = count_faults(audio, _AUDIO_SIZES) + fixed_faults(audio, _AUDIO_FIXED)
    channels = audio["subsampling_conv_channels"]
    if len(channels) != 2 or channels[0] != MEL_BINS:
        faults.append(
            f"subsampling_conv_channels is {channels!r}, where it is two numbers, the first of them {MEL_BINS}"
        )
    return faults or multiple_faults(audio["hidden_size"], num_attention_heads=audio["num_attention_heads"])
