"""What a medium's encoder and projector are to a model, whatever they read. Letters for shapes: see `schema`."""

from abc import ABC, abstractmethod
from collections.abc import Iterable

import torch
from torch import Tensor, nn


class Tower(nn.Module, ABC):
    """An encoder and the projector behind it: units (U, ...) of media to token embeddings, those of item after item."""

    @abstractmethod
    def features(self, values: Tensor, sizes: Tensor) -> Tensor:
        """What the encoder makes of the media; arguments are those of `schema.Media`."""

    @abstractmethod
    def connect(self, features: Tensor, sizes: Tensor) -> Tensor:
        """Token embeddings (places, D) of the encoder's features."""

    @abstractmethod
    def dummy(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Values and sizes of the least input there is."""

    @abstractmethod
    def encoder_parameters(self) -> Iterable[nn.Parameter]:
        """The parameters that `features` uses."""

    def forward(self, values: Tensor, sizes: Tensor) -> Tensor:
        """Token embeddings (places, D) of the media. A wholly frozen encoder runs without a graph."""
        # autograd would see that by itself, activation checkpointing would not
        is_trainable = any(parameter.requires_grad for parameter in self.encoder_parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and is_trainable):
            features = self.features(values, sizes)
        return self.connect(features, sizes)
