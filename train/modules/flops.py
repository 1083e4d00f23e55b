"""Floating-point work of a training step, predicted from the model's sizes and a record's lengths.

A multiply and an add are two operations; norms, activations and embeddings are left out. A module that
learns costs three forwards, a frozen one below something that learns costs two (its inputs' gradients),
and any other one.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

SLICE_PATCHES = 1024
"""Patches of a usual slice (448×448 pixels), where each attends to all others."""


@dataclass(frozen=True)
class Flops:
    """Operations of a record: linear in its tokens, patches and mel frames, and in its tokens squared.

    head: operations for each supervised token; the record's lengths do not tell it, so `of` leaves it out.
    """

    token: float
    token_squared: float
    patch: float
    frame: float
    head: float

    def of(self, lengths: np.ndarray) -> np.ndarray:
        """Operations of each record: lengths int (records, 3) of tokens, patches, frames to float64 (records,)."""
        tokens, patches, frames = lengths.astype(np.float64).T
        return self.token * tokens + self.token_squared * tokens**2 + self.patch * patches + self.frame * frames


def size_of(parameter: nn.Parameter) -> int:
    """Values of a parameter as the layer sees it: whole under ZeRO-3, unpacked where 4-bit values share a byte."""
    if state := getattr(parameter, "quant_state", None):
        return state.shape.numel()
    return getattr(parameter, "ds_numel", parameter.numel())


def megrezo_flops(model: nn.Module, config: Any, tuned: Collection[str]) -> Flops:
    """The work of a Megrez-3B-Omni.

    model: for its modules' sizes; meta tensors and ZeRO-3 shards will do.
    tuned: modules that learn; adapters count as learning modules, which overstates them a little.
    """
    vision, audio = config.vision_arguments(), config.audio_arguments()
    layers = [layer for name, layer in model.named_modules() if name.endswith("llm.model.layers")]
    size = {
        "llm": sum(map(_parameters, layers)),
        "head": config.vocab_size * config.hidden_size,
        "vpm": _parameters(_submodule(model, "vision.vpm.encoder")) + 3 * config.patch_size**2 * vision["hidden_size"],
        "resampler": vision["hidden_size"] * config.hidden_size + 2 * config.hidden_size**2,
        "audio": _parameters(_submodule(model, "audio.audio.blocks")) + 3 * audio["n_state"] ** 2,
        "audio_proj": audio["n_state"] * config.hidden_size / audio["avg_pool"],
        "conv1": 3 * audio["n_mels"] * audio["n_state"],
    }
    passes = _passes(tuned)
    vision_attention = 4 * SLICE_PATCHES * vision["hidden_size"] * vision["num_hidden_layers"]
    return Flops(
        token=2 * size["llm"] * passes["llm"],
        token_squared=2 * config.hidden_size * config.num_hidden_layers * passes["llm"],
        patch=(2 * size["vpm"] + vision_attention) * passes["vision_encoder"]
        + 2 * size["resampler"] * passes["vision_proj"],
        # the encoder runs at half the rate of mel frames, the projection at half of that
        frame=(2 * size["conv1"] + size["audio"]) * passes["audio_encoder"] + size["audio_proj"] * passes["audio_proj"],
        head=2 * size["head"] * passes["llm"],
    )


def text_flops(model: nn.Module, config: Any, tuned: Collection[str]) -> Flops:
    """The work of a model of text alone; arguments as for `megrezo_flops`."""
    layers = [layer for name, layer in model.named_modules() if name.endswith("model.layers")]
    passes = _passes(tuned)["llm"]
    return Flops(
        token=2 * sum(map(_parameters, layers)) * passes,
        token_squared=2 * config.hidden_size * config.num_hidden_layers * passes,
        patch=0,
        frame=0,
        head=2 * config.vocab_size * config.hidden_size * passes,
    )


def _passes(tuned: Collection[str]) -> Mapping[str, int]:
    """Forwards' worth of work that a step spends in each module: 1 frozen, 2 passed through, 3 learning."""
    below: dict[str, tuple[str, ...]] = {"llm": ("vision_encoder", "vision_proj", "audio_encoder", "audio_proj")}
    below |= {"vision_proj": ("vision_encoder",), "audio_proj": ("audio_encoder",)}
    passes = {}
    for name in ("llm", "vision_proj", "vision_encoder", "audio_proj", "audio_encoder"):
        if name in tuned:
            passes[name] = 3
        else:
            passes[name] = 2 if set(below.get(name, ())) & set(tuned) else 1
    return passes


def _parameters(module: nn.Module) -> int:
    return sum(map(size_of, module.parameters()))


def _submodule(model: nn.Module, end: str) -> nn.Module:
    return next(module for name, module in model.named_modules() if name.endswith(end))
