"""Models of text alone over packs: a plain Llama, and MiniCPM with its muP scales. Keys are the stock ones.

They are named like the published classes, since transformers writes the name of a model's class into its config.json.
"""

from typing import Any

import transformers
from torch import Tensor, nn

from train.model_settings import refuse
from train.modules.attention import ATTENTION_NAME
from train.modules.llm import RotaryEmbedding
from train.modules.packed import PackedModel
from train.modules.supported import llm_faults
from train.schema import Batch


class LlamaConfig(transformers.LlamaConfig):
    """The stock configuration; CheckpointError names each value that the model does not implement."""

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        refuse(llm_faults(self))


class PackedText(PackedModel):
    """Mixed into a transformers language model: it takes a `Batch`, or what it always took."""

    model: nn.Module

    def __init__(self, config: transformers.LlamaConfig):
        config._attn_implementation = ATTENTION_NAME
        super().__init__(config)  # type: ignore[call-arg]  # of the model that this is mixed into
        self.model.rotary_emb = RotaryEmbedding(config)

    @property
    def llm(self) -> Any:  # type: ignore[override]
        return self

    def forward(  # type: ignore[override]  # the names are those by which transformers' generation finds what a model takes
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
        return super(PackedModel, self).forward(  # type: ignore[misc]  # that of the transformers model
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
