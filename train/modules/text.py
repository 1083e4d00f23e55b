"""Models of text alone over packs: a plain Llama, and MiniCPM with its muP scales. Keys are the stock ones.

They are named like the published classes, since transformers writes the name of a model's class into its config.json.
"""

from typing import Any

import transformers
from torch import Tensor
from transformers import GraniteForCausalLM

from train.modules.attention import ATTENTION_NAME
from train.modules.llm import RotaryEmbedding
from train.modules.packed import PackedModel
from train.modules.supported import llm_faults
from train.schema import Batch
from train.settings import count_faults, refuse, scale_faults


class LlamaConfig(transformers.LlamaConfig):
    """The stock configuration; CheckpointError names each value that the model does not implement."""

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        refuse(llm_faults(self))


class PackedText(PackedModel):
    """Mixed into a transformers language model: it takes a `Batch`, or what it always took."""

    model: Any

    def __init__(self, config: transformers.LlamaConfig):
        config._attn_implementation = ATTENTION_NAME
        super().__init__(config)  # type: ignore[call-arg]  # of the model that this is mixed into
        self.model.rotary_emb = RotaryEmbedding(config)

    @property
    def llm(self) -> Any:  # type: ignore[override]
        return self

    def forward(  # the names are those by which transformers' generation finds what a model takes
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        *,
        batch: Batch | None = None,
        **others,
    ) -> Any:
        """The loss of a pack; without one, the plain model's forward."""
        if batch is not None:
            return self.packed_loss(batch)
        return super().forward(  # type: ignore[misc]
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            logits_to_keep=logits_to_keep,
            **others,
        )


class LlamaForCausalLM(PackedText, transformers.LlamaForCausalLM):  # type: ignore[misc]  # `generate` takes more
    """Megrez-3B-Instruct, and MiniCPM-2B in its Llama form."""

    config_class = LlamaConfig


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
