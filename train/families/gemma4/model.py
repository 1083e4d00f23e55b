"""Gemma 4 E2B and E4B over flat packs. Parameter names are those of the published checkpoint."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Gemma4TextConfig, GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.gemma4.modeling_gemma4 import (
    Gemma4MultimodalEmbedder,
    Gemma4PreTrainedModel,
    Gemma4TextModel,
)

from train.families.gemma4.config import Gemma4Config
from train.families.gemma4.towers import AudioEncoder, GemmaTower, VisionEncoder
from train.modules.attention import ATTENTION_NAME, Segments
from train.modules.llm import ExactBuffers, packed_hidden_states
from train.modules.loss import capped
from train.modules.packed import PackedModel
from train.modules.towers import Tower
from train.schema import Batch, Kind

_ENDS = [1, 106]
"""<eos> and <turn|>: they end an answer where a folder has no generation_config.json that says so."""


class LanguageModel(Gemma4PreTrainedModel, GenerationMixin):
    """The text model with its head, as generation takes it."""

    config: Any

    def __init__(self, config: Gemma4TextConfig):
        config._attn_implementation = ATTENTION_NAME
        super().__init__(config)
        self.model = Gemma4TextModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        per_layer_inputs: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **others: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of padded rows, (N, T, V): what transformers' generation calls."""
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            per_layer_inputs=per_layer_inputs,
            **others,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = capped(self.lm_head(out.last_hidden_state[:, kept]), self.config.final_logit_softcapping)
        return CausalLMOutputWithPast(logits=logits, past_key_values=out.past_key_values)

    def prepare_inputs_for_generation(  # type: ignore[override]  # what else it takes is handed on
        self, input_ids: Tensor, inputs_embeds: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Those of transformers; per-layer inputs are the prompt's, and go with its embeddings."""
        inputs = super().prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)  # type: ignore[arg-type, misc]
        if inputs.get("inputs_embeds") is None:
            inputs.pop("per_layer_inputs", None)
        return inputs


class Parts(nn.Module):
    """What the published model holds under `model`."""

    def __init__(self, config: Any, language_model: Gemma4TextModel):
        super().__init__()
        self.language_model = language_model
        self.vision_tower = VisionEncoder(config.vision_config)
        self.embed_vision = Gemma4MultimodalEmbedder(config.vision_config, config.text_config)
        self.audio_tower = AudioEncoder(config.audio_config)
        self.embed_audio = Gemma4MultimodalEmbedder(config.audio_config, config.text_config)


class Gemma4ForConditionalGeneration(ExactBuffers, PackedModel, Gemma4PreTrainedModel, GenerationMixin):  # type: ignore[misc]  # `generate` takes more
    """Gemma 4 over packs of samples. Its name is the published class's, which goes into config.json.

    Its buffers (frequencies, bounds of the towers' clipped layers, scales) stay float32 when the model is cast.
    """

    config_class = Gemma4Config
    main_input_name = "batch"
    _supports_sdpa = True
    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}  # noqa: RUF012
    _no_split_modules = ["Gemma4TextDecoderLayer", "Gemma4VisionEncoderLayer", "AudioLayer"]  # noqa: RUF012
    llm: LanguageModel

    def __init__(self, config: Gemma4Config):
        super().__init__(config)
        llm = LanguageModel(config.text_config)  # type: ignore[arg-type]  # no dict once it is made
        # It is no part of the model: its own parts stand under their published names.
        object.__setattr__(self, "llm", llm)
        self.model = Parts(config, llm.model)
        self.lm_head = llm.lm_head
        self.logit_cap = llm.config.final_logit_softcapping
        self.post_init()

    @property
    def towers(self) -> dict[Kind, Tower]:
        """The tower of each kind of media."""
        parts = self.model
        return {
            "image": GemmaTower(parts.vision_tower, parts.embed_vision),
            "audio": GemmaTower(parts.audio_tower, parts.embed_audio),
        }

    def per_layer_inputs(self, batch: Batch) -> Tensor:
        """The table's rows of each token, (T, layers, width); places of media have the padding's."""
        ids = batch.input_ids
        for media in batch.media.values():
            ids = ids.index_fill(0, media.places, self.llm.config.pad_token_id)
        return self.llm.model.get_per_layer_inputs(ids)

    def hidden_states(self, batch: Batch) -> Tensor:
        """What the head takes of all tokens: final hidden states, normed, (T, D)."""
        embeddings = self.embed(batch)
        segments = Segments.of_cu_seqlens(batch.cu_seqlens, embeddings.device)
        per_layer = self.per_layer_inputs(batch)[None]
        return packed_hidden_states(self.llm, embeddings, batch.position_ids, segments, per_layer_inputs=per_layer)  # type: ignore[arg-type]

    @torch.no_grad()
    def generate(self, inputs: Batch | Tensor | None = None, **options: Any) -> Any:  # type: ignore[override]
        """Answers to N prompts, as `PackedModel.generate` gives them."""
        if isinstance(inputs, Batch):
            lengths = inputs.cu_seqlens.diff().tolist()
            rows = self.per_layer_inputs(inputs).split(lengths)
            padded = [F.pad(row, (0, 0, 0, 0, max(lengths) - len(row), 0)) for row in rows]
            options["per_layer_inputs"] = torch.stack(padded)
            if self.generation_config.eos_token_id is None:
                options.setdefault("eos_token_id", _ENDS)
        return super().generate(inputs, **options)
