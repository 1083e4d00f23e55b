"""The configuration of Qwen2.5-Omni: the published one, with the values refused that are not implemented."""

from collections.abc import Mapping
from typing import Any

from transformers import Qwen2_5OmniConfig

from train.model_settings import count_faults, fixed_faults, multiple_faults, refuse
from train.modules.supported import llm_faults

_VISION_FIXED = {"hidden_act": "silu", "in_channels": 3, "temporal_patch_size": 2}
_AUDIO_FIXED = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
_AUDIO_SIZES = ("num_mel_bins", "encoder_layers", "encoder_attention_heads", "encoder_ffn_dim", "d_model", "n_window")


class QwenOmniConfig(Qwen2_5OmniConfig):
    """The published layout; without arguments it is Qwen2.5-Omni-7B.

    CheckpointError names each value of the thinker's that the model does not implement.
    """

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        thinker: Any = self.thinker_config
        text, vision, audio = thinker.text_config, vars(thinker.vision_config), vars(thinker.audio_config)
        # The head is a weight of its own in every published folder.
        faults = fixed_faults(vars(thinker), {"tie_word_embeddings": False})
        faults += [f"text_config.{fault}" for fault in _text_faults(text)]
        faults += [f"vision_config.{fault}" for fault in _vision_faults(vision, text.hidden_size)]
        faults += [f"audio_config.{fault}" for fault in _audio_faults(audio, text.hidden_size)]
        refuse([f"thinker_config.{fault}" for fault in faults])

    @property
    def max_position_embeddings(self) -> int:
        """Tokens of the longest conversation, its answer included."""
        return self.get_text_config().max_position_embeddings


def _text_faults(text: Any) -> list[str]:
    faults = llm_faults(text, use_sliding_window=False)
    head = text.hidden_size // text.num_attention_heads
    sections = text.rope_parameters.get("mrope_section", [16, 24, 24])  # what transformers takes
    if not isinstance(sections, list) or len(sections) != 3 or 2 * sum(sections) != head:
        faults.append(
            f"rope_scaling's mrope_section is {sections!r}, where it is three numbers that make up half of a head's "
            f"{head} dimensions"
        )
    return faults


def _vision_faults(vision: Mapping[str, Any], width: int) -> list[str]:
    sizes = ("depth", "hidden_size", "intermediate_size", "num_heads", "patch_size", "spatial_merge_size")
    faults = count_faults(vision, (*sizes, "window_size"))
    faults = faults or multiple_faults(vision["hidden_size"], num_heads=vision["num_heads"])
    faults = faults or multiple_faults(
        vision["window_size"], patches=vision["patch_size"] * vision["spatial_merge_size"]
    )
    return faults + fixed_faults(vision, _VISION_FIXED | {"out_hidden_size": width})


def _audio_faults(audio: Mapping[str, Any], width: int) -> list[str]:
    faults = count_faults(audio, (*_AUDIO_SIZES, "max_source_positions"))
    faults = faults or multiple_faults(audio["d_model"], encoder_attention_heads=audio["encoder_attention_heads"])
    if not faults and audio["max_source_positions"] < audio["n_window"]:
        faults.append(
            f"max_source_positions is {audio['max_source_positions']}, less than n_window ({audio['n_window']})"
        )
    return faults + fixed_faults(audio, _AUDIO_FIXED | {"output_dim": width})
