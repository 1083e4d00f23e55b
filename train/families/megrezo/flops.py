"""Floating-point work of a Megrez-3B-Omni."""

from collections.abc import Collection
from typing import Any

from torch import nn

from train.modules.flops import Flops, parameters_of, passes_of, submodule

SLICE_PATCHES = 1024
"""Patches of a usual slice (448×448 pixels), where each attends to all others."""


def megrezo_flops(model: nn.Module, tuned: Collection[str], adapted: Collection[str] = ()) -> Flops:
    """The work of a Megrez-3B-Omni.

    model: without adapters and not sharded; on the meta device will do.
    tuned, adapted: see `passes_of`.
    """
    config: Any = model.config
    vision, audio = config.vision_arguments(), config.audio_arguments()
    layers = [layer for name, layer in model.named_modules() if name.endswith("llm.model.layers")]
    size = {
        "llm": sum(map(parameters_of, layers)),
        "head": config.vocab_size * config.hidden_size,
        "vpm": parameters_of(submodule(model, "vision.vpm.encoder")) + 3 * config.patch_size**2 * vision["hidden_size"],
        "resampler": vision["hidden_size"] * config.hidden_size + 2 * config.hidden_size**2,
        "audio": parameters_of(submodule(model, "audio.audio.blocks")) + 3 * audio["n_state"] ** 2,
        "audio_proj": audio["n_state"] * config.hidden_size / audio["avg_pool"],
        "conv1": 3 * audio["n_mels"] * audio["n_state"],
    }
    passes = passes_of(tuned, adapted)
    vision_attention = 4 * SLICE_PATCHES * vision["hidden_size"] * vision["num_hidden_layers"]
    return Flops(
        token=2 * size["llm"] * passes["llm"],
        token_squared=2 * config.hidden_size * config.num_hidden_layers * passes["llm"],
        head=2 * size["head"] * passes["llm"],
        unit={
            "image": (2 * size["vpm"] + vision_attention) * passes["vision_encoder"]
            + 2 * size["resampler"] * passes["vision_proj"],
            # the encoder runs at half the rate of mel frames, the projection at half of that
            "audio": (2 * size["conv1"] + size["audio"]) * passes["audio_encoder"]
            + size["audio_proj"] * passes["audio_proj"],
        },
    )
