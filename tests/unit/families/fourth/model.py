"""The model: a Llama, and a tower of two linear layers."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, LlamaConfig

from train.modules.llm import build_llm
from train.modules.packed import PackedModel
from train.modules.towers import Tower
from train.schema import Kind


class FourthConfig(LlamaConfig):
    model_type = "fourth"


class Vision(Tower):
    def __init__(self, width: int):
        super().__init__()
        self.encoder = nn.Linear(3, 8)
        self.projector = nn.Linear(8, width)

    def features(self, values: Tensor, sizes: Tensor) -> Tensor:
        return self.encoder(values.to(self.encoder.weight.dtype))

    def connect(self, features: Tensor, sizes: Tensor) -> Tensor:
        return self.projector(features)

    def dummy(self, device: torch.device) -> tuple[Tensor, Tensor]:
        return torch.zeros(1, 3, device=device), torch.tensor([1])

    def encoder_parameters(self) -> Iterable[nn.Parameter]:
        return self.encoder.parameters()


class FourthForCausalLM(PackedModel, GenerationMixin):
    config_class = FourthConfig
    main_input_name = "batch"

    def __init__(self, config: FourthConfig):
        super().__init__(config)
        self.llm = build_llm(config)
        self.vision = Vision(config.hidden_size)
        self.post_init()

    @property
    def towers(self) -> dict[Kind, Tower]:
        return {"image": self.vision}
