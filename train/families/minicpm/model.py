"""MiniCPM-2B: a Llama with muP scales. Keys are the published ones."""

from typing import Any

import transformers
from torch import Tensor
from transformers import GraniteForCausalLM

from train.model_settings import count_faults, refuse, scale_faults
from train.modules.supported import llm_faults
from train.modules.text import PackedText
from train.schema import Batch


class MiniCPMConfig(transformers.LlamaConfig):
    """Configuration of MiniCPM with the published keys. Without arguments it is MiniCPM-2B."""

    model_type = "minicpm"

    vocab_size: int = 122_753
    hidden_size: int = 2304
    intermediate_size: int = 5760
    num_hidden_layers: int = 40
    num_attention_heads: int = 36
    num_key_value_heads: int | None = 36
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.1
    tie_word_embeddings: bool = True
    scale_emb: int | float = 12
    """Embeddings are multiplied by it."""
    scale_depth: int | float = 1.4
    """What a layer's attention and MLP add is multiplied by it, and divided by the root of the number of layers."""
    dim_model_base: int = 256
    """What the head takes is divided by `hidden_size` over it."""

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        # The scales go into weights: a bias of what ends a branch would need its own.
        faults = llm_faults(self, attention_bias=False, mlp_bias=False)
        faults += scale_faults(vars(self), ("scale_emb", "scale_depth"))
        faults += count_faults(vars(self), ("dim_model_base",))
        refuse(faults)

    # The same constants under the names that transformers' Granite, a Llama with such scales, reads.
    @property
    def embedding_multiplier(self) -> float:
        return self.scale_emb

    @property
    def residual_multiplier(self) -> float:
        return self.scale_depth / self.num_hidden_layers**0.5

    @property
    def attention_multiplier(self) -> float:
        return self.head_dim**-0.5  # type: ignore[operator]  # never None once it is made

    @property
    def logits_scaling(self) -> float:
        return self.hidden_size / self.dim_model_base


class MiniCPMForCausalLM(PackedText, GraniteForCausalLM):  # type: ignore[misc]
    """MiniCPM-2B: a Llama with muP scales and, as published, one matrix for embedding and head."""

    config_class = MiniCPMConfig

    def hidden_states(self, batch: Batch) -> Tensor:
        """What the head takes of all tokens: (T, D), scaled down."""
        return super().hidden_states(batch) / self.config.logits_scaling
