"""Qwen2.5-Omni's thinker over flat packs: it reads text, images and recordings, and writes text.

Parameter names are those of the published checkpoint, whatever transformers calls its own; the parts are transformers'.
The checkpoint's talker and vocoder are not loaded: an export carries them along.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel, Qwen2_5OmniThinkerConfig
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import (
    Qwen2_5OmniRotaryEmbedding,
    Qwen2_5OmniThinkerTextModel,
)

from train.families.qwen_omni.config import QwenOmniConfig
from train.families.qwen_omni.towers import AudioTower, VisionTower
from train.modules.attention import ATTENTION_NAME
from train.modules.llm import ExactBuffers
from train.modules.packed import PackedModel
from train.modules.towers import Tower
from train.schema import Batch, Kind

_ENDS = [151_645, 151_643]
"""<|im_end|> and <|endoftext|>: they end an answer where a folder has no generation_config.json that says so."""


class ThinkerRotaryEmbedding(ExactBuffers, Qwen2_5OmniRotaryEmbedding):
    """Whose frequencies stay float32 when the model is cast."""


class Thinker(PreTrainedModel, GenerationMixin):  # type: ignore[misc]  # `generate` takes more
    """The language model with its head, and beside it the towers, which `PackedModel.embed` runs."""

    config_class = Qwen2_5OmniThinkerConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    def __init__(self, config: Qwen2_5OmniThinkerConfig):
        super().__init__(config)
        parts: Any = config
        text = parts.text_config
        text._attn_implementation = ATTENTION_NAME
        self.audio_tower = AudioTower(parts.audio_config)
        self.visual = VisionTower(parts.vision_config)
        self.model = Qwen2_5OmniThinkerTextModel(text)
        self.model.rotary_emb = ThinkerRotaryEmbedding(text)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
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
            **others,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return CausalLMOutputWithPast(
            logits=self.lm_head(out.last_hidden_state[:, kept]), past_key_values=out.past_key_values
        )


class Qwen2_5OmniForConditionalGeneration(PackedModel, GenerationMixin):  # type: ignore[misc]  # `generate` takes more
    """Qwen2.5-Omni over packs of samples. Its name is the published class's, which goes into config.json."""

    config_class = QwenOmniConfig
    main_input_name = "batch"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _keys_to_ignore_on_load_unexpected = [r"^talker\.", r"^token2wav\."]  # noqa: RUF012
    _no_split_modules = [  # noqa: RUF012
        "Qwen2_5OmniDecoderLayer",
        "Qwen2_5OmniVisionBlock",
        "Qwen2_5OmniAudioEncoderLayer",
    ]

    def __init__(self, config: QwenOmniConfig):
        super().__init__(config)
        self.thinker = Thinker(config.thinker_config)  # type: ignore[arg-type]  # no dict once it is made
        self.post_init()

    @property
    def llm(self) -> Any:  # type: ignore[override]
        return self.thinker

    @property
    def towers(self) -> dict[Kind, Tower]:
        """The tower of each kind of media."""
        return {"image": self.thinker.visual, "audio": self.thinker.audio_tower}

    @torch.no_grad()
    def generate(self, inputs: Batch | Tensor | None = None, **options: Any) -> Any:  # type: ignore[override]
        """Answers to N prompts, as `PackedModel.generate` gives them; they go on from each prompt's last position."""
        if isinstance(inputs, Batch):
            lengths = inputs.cu_seqlens.diff().tolist()
            rows = inputs.position_ids.expand(3, -1).split(lengths, dim=1)
            options["position_ids"] = torch.stack([F.pad(row, (max(lengths) - row.shape[1], 0)) for row in rows], dim=1)
            if self.generation_config.eos_token_id is None:
                options.setdefault("eos_token_id", _ENDS)
        return super().generate(inputs, **options)
