"""Floating-point work of a Qwen2.5-Omni thinker."""

from collections.abc import Collection
from typing import Any

from torch import nn

from train.modules.flops import Flops, parameters_of, passes_of, submodule

IMAGE_PATCHES = 1024
"""Patches of a usual image (448×448 pixels), which attend to each other in the layers without windows."""


def qwen_omni_flops(model: nn.Module, tuned: Collection[str], adapted: Collection[str] = ()) -> Flops:
    """The work of a Qwen2.5-Omni.

    model: without adapters and not sharded; on the meta device will do.
    tuned, adapted: see `passes_of`.
    """
    thinker: Any = model.config.thinker_config  # type: ignore[union-attr]
    text, vision, audio = thinker.text_config, thinker.vision_config, thinker.audio_config
    passes = passes_of(tuned, adapted)
    llm = parameters_of(submodule(model, "thinker.model.layers"))
    blocks = parameters_of(submodule(model, "visual.blocks"))
    patch_embedding = parameters_of(submodule(model, "visual.patch_embed"))
    merger = parameters_of(submodule(model, "visual.merger")) / vision.spatial_merge_size**2
    window = (vision.window_size // vision.patch_size) ** 2
    whole = len(vision.fullatt_block_indexes)
    seen = whole * IMAGE_PATCHES + (vision.depth - whole) * window
    # The encoder runs at half the rate of mel frames, the projection at a quarter.
    layers = parameters_of(submodule(model, "audio_tower.layers")) / 2
    convolutions = 3 * audio.d_model * (audio.num_mel_bins + audio.d_model / 2)
    heard = audio.n_window * audio.encoder_layers / 2
    return Flops(
        token=2 * llm * passes["llm"],
        token_squared=2 * text.hidden_size * text.num_hidden_layers * passes["llm"],
        head=2 * text.vocab_size * text.hidden_size * passes["llm"],
        unit={
            "image": (2 * (blocks + patch_embedding) + 4 * seen * vision.hidden_size) * passes["vision_encoder"]
            + 2 * merger * passes["vision_proj"],
            "audio": (2 * (layers + convolutions) + 4 * heard * audio.d_model) * passes["audio_encoder"]
            + audio.d_model * text.hidden_size / 2 * passes["audio_proj"],
        },
    )
