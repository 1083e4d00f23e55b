"""Floating-point work of a Gemma 4 E2B or E4B."""

from collections.abc import Collection
from typing import Any

from torch import nn

from train.modules.flops import Flops, parameters_of, passes_of, submodule


def gemma4_flops(model: nn.Module, tuned: Collection[str], adapted: Collection[str] = ()) -> Flops:
    """The work of a Gemma 4.

    Layers with a sliding window are counted as if every token had its window before it.

    model: without adapters and not sharded; on the meta device will do.
    tuned, adapted: see `passes_of`.
    """
    config: Any = model.config
    text, vision, audio = config.text_config, config.vision_config, config.audio_config
    passes = passes_of(tuned, adapted)
    language = submodule(model, "language_model")
    projection: Any = language.per_layer_model_projection
    llm = parameters_of(submodule(model, "language_model.layers")) + projection.weight.numel()
    heads = {True: 0, False: 0}
    for layer in language.layers:  # type: ignore[union-attr]
        attention: Any = layer.self_attn
        heads[attention.is_sliding] += text.num_attention_heads * attention.head_dim
    # The convolutions run over half and a quarter of the frames and the bins, the layers at a quarter of the rate.
    first, second = audio.subsampling_conv_channels
    bins = first / 2
    convolutions = 9 * (first * bins / 2 + first * second * bins / 2 / 4) + audio.hidden_size * second * bins / 2 / 4
    seen = audio.attention_chunk_size + audio.attention_context_left - 1
    layers = (
        parameters_of(submodule(model, "audio_tower.layers")) + 2 * seen * audio.num_hidden_layers * audio.hidden_size
    )
    layers += parameters_of(submodule(model, "audio_tower.output_proj"))
    blocks = (
        parameters_of(submodule(model, "vision_tower.encoder.layers")) + 3 * vision.patch_size**2 * vision.hidden_size
    )
    width = vision.num_attention_heads * vision.head_dim * vision.num_hidden_layers
    vision_proj, audio_proj = (parameters_of(submodule(model, name)) for name in ("embed_vision", "embed_audio"))
    return Flops(
        token=(2 * llm + 4 * text.sliding_window * heads[True]) * passes["llm"],
        token_squared=2 * heads[False] * passes["llm"],
        head=2 * text.vocab_size * text.hidden_size * passes["llm"],
        unit={
            "image": (2 * blocks + 4 * IMAGE_PATCHES * width) * passes["vision_encoder"]
            + 2 * vision_proj / vision.pooling_kernel_size**2 * passes["vision_proj"],
            "audio": (2 * convolutions + layers / 2) * passes["audio_encoder"] + audio_proj / 2 * passes["audio_proj"],
        },
    )


IMAGE_PATCHES = 2520
"""Patches of an image at the published budget of 280 places, which all attend to each other."""
