"""Floating-point work of a training step, predicted from the model's sizes and a record's lengths.

A multiply and an add are two operations; norms, activations and embeddings are left out. A module that
learns costs three forwards, a frozen one below something that learns costs two (its inputs' gradients),
and any other one.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import nn

from train.schema import KINDS, Kind


@dataclass(frozen=True)
class Flops:
    """Operations of a record: linear in its tokens and in the units of its media, and in its tokens squared.

    head: operations for each supervised token; the record's lengths do not tell it, so `of` leaves it out.
    """

    token: float
    token_squared: float
    head: float
    unit: Mapping[Kind, float] = field(default_factory=dict)

    def of(self, lengths: np.ndarray) -> np.ndarray:
        """Operations of each record: int (records, 1 + kinds), rows of `Lengths`, to float64 (records,)."""
        tokens, *units = lengths.astype(np.float64).T
        media = sum(self.unit.get(kind, 0.0) * of_kind for kind, of_kind in zip(KINDS, units, strict=True))
        return self.token * tokens + self.token_squared * tokens**2 + media


def text_flops(model: nn.Module, tuned: Collection[str], adapted: Collection[str] = ()) -> Flops:
    """The work of a model of text alone, on the meta device will do; `tuned`, `adapted`: see `passes_of`."""
    config: Any = model.config
    layers = [layer for name, layer in model.named_modules() if name.endswith("model.layers")]
    passes = passes_of(tuned, adapted)["llm"]
    return Flops(
        token=2 * sum(map(parameters_of, layers)) * passes,
        token_squared=2 * config.hidden_size * config.num_hidden_layers * passes,
        head=2 * config.vocab_size * config.hidden_size * passes,
    )


def passes_of(tuned: Collection[str], adapted: Collection[str] = ()) -> Mapping[str, int]:
    """Forwards' worth of work that a step spends in each module: 1 frozen, 2 passed through, 3 learning.

    tuned: modules that learn.
    adapted: those that learn through adapters alone. Their own weights need no gradient; what the adapters add, some
    percent of a forward, is left out.
    """
    below: dict[str, tuple[str, ...]] = {"llm": ("vision_encoder", "vision_proj", "audio_encoder", "audio_proj")}
    below |= {"vision_proj": ("vision_encoder",), "audio_proj": ("audio_encoder",)}
    passes = {}
    for name in ("llm", "vision_proj", "vision_encoder", "audio_proj", "audio_encoder"):
        if name in tuned:
            passes[name] = 2 if name in adapted else 3
        else:
            passes[name] = 2 if set(below.get(name, ())) & set(tuned) else 1
    return passes


def parameters_of(module: nn.Module) -> int:
    """Values of all parameters of a module."""
    return sum(parameter.numel() for parameter in module.parameters())


def submodule(model: nn.Module, end: str) -> nn.Module:
    """The first submodule whose name ends so."""
    return next(module for name, module in model.named_modules() if name.endswith(end))
