"""What every model of the project does over packs: loss, logits, answers. Letters for shapes: see `schema`."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.utils import ModelOutput

from train.modules.attention import Segments
from train.modules.chatting import ChatMixin
from train.modules.llm import packed_hidden_states
from train.modules.loss import capped, token_losses
from train.modules.towers import Tower
from train.schema import Batch, Kind


@dataclass
class PackedOutput(ModelOutput):
    """What a packed forward returns. (A ModelOutput, because DeepSpeed's hooks look for tensors in dicts.)"""

    loss_sum: Tensor | None = None
    """float32 scalar: the sum over supervised tokens of weight · cross-entropy, with its graph."""
    token_losses: Tensor | None = None
    """float32 (M,): cross-entropy of each supervised token, unweighted, without a graph."""


class PackedModel(ChatMixin, PreTrainedModel):
    """A transformers model whose language model is `llm`: a Llama, or what has a Llama's parts.

    While training, every tower runs in every forward; `running_every_tower` says so of evaluation. `liger_loss` picks
    Liger's kernel for the loss (see `loss.token_losses`); `logit_cap` bends the logits (see `loss.capped`).
    """

    llm: Any
    generation_config: Any
    _runs_every_tower: bool = False
    liger_loss: bool = False
    logit_cap: float | None = None

    def get_input_embeddings(self) -> nn.Module:
        return self.llm.model.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        return self.llm.lm_head

    @property
    def towers(self) -> Mapping[Kind, Tower]:
        """The tower of each kind of media; none in a model of text alone."""
        return {}

    @contextmanager
    def running_every_tower(self, wanted: bool) -> Iterator[None]:
        """Within, whether a tower for which a batch has nothing runs on its dummy in evaluation too.

        Several ranks need that: under ZeRO-3 all of them must run the same modules.
        """
        self._runs_every_tower = wanted
        try:
            yield
        finally:
            self._runs_every_tower = False

    def embed(self, batch: Batch) -> Tensor:
        """Token embeddings with what the towers make of the media in their places: (T, D).

        Each tower runs once; where the batch has nothing for it, on a dummy whose output counts zero times.
        So every rank runs the same collectives, and every parameter has a gradient, whatever a batch holds.
        """
        embeddings = self.get_input_embeddings()(batch.input_ids)
        call_all = self.training or self._runs_every_tower
        for kind, tower in self.towers.items():
            if media := batch.media.get(kind):
                embedded = tower(media.values, media.sizes).to(embeddings.dtype)
                embeddings = embeddings.index_copy(0, media.places, embedded)
            elif call_all:
                nothing = (tower(*tower.dummy(embeddings.device)) * 0).sum()
                embeddings = embeddings + nothing.to(embeddings.dtype)
        return embeddings

    def hidden_states(self, batch: Batch) -> Tensor:
        """What the head takes of all tokens: final hidden states, normed, (T, D)."""
        embeddings = self.embed(batch)
        segments = Segments.of_cu_seqlens(batch.cu_seqlens, embeddings.device)
        return packed_hidden_states(self.llm, embeddings, batch.position_ids, segments)

    def logits(self, batch: Batch) -> Tensor:
        """Logits of all tokens, (T, V): for comparisons, not for training."""
        return capped(self.llm.lm_head(self.hidden_states(batch)), self.logit_cap)

    def forward(self, batch: Batch | None = None, **llm_inputs: Any) -> ModelOutput:
        """The loss of a pack; without one, the language model's own forward (`input_ids=...` and the like)."""
        return self.llm(**llm_inputs) if batch is None else self.packed_loss(batch)

    def packed_loss(self, batch: Batch) -> PackedOutput:
        """The loss of a pack."""
        hidden = self.hidden_states(batch).index_select(0, batch.target_positions)
        head = self.llm.lm_head.weight
        losses = token_losses(hidden, head, batch.targets, cap=self.logit_cap, liger=self.liger_loss)
        return PackedOutput(loss_sum=(losses * batch.loss_weights).sum(), token_losses=losses.detach())

    @torch.no_grad()
    def generate(self, inputs: Batch | Tensor | None = None, **options) -> Any:
        """Answers to N prompts; without a `Batch`, what transformers' `generate` makes of the language model.

        Args:
            inputs: the prompts, one sample each.
            options: those of transformers' `generate` (max_new_tokens, do_sample, synced_gpus, ...).

        Returns:
            N tensors int64: the new tokens up to the first end-of-sequence token, which is left out.
        """
        if not isinstance(inputs, Batch):
            return GenerationMixin.generate(self.llm, inputs, **options)
        generation = deepcopy(options.pop("generation_config", self.generation_config))
        others = generation.update(**options)
        lengths = inputs.cu_seqlens.diff().tolist()
        longest = max(lengths)
        prompts = self.embed(inputs).split(lengths)
        padded = torch.stack([F.pad(prompt, (0, 0, longest - len(prompt), 0)) for prompt in prompts])
        is_token = torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]
        answers = GenerationMixin.generate(
            self.llm,
            inputs_embeds=padded,
            attention_mask=is_token.long().to(padded.device),
            generation_config=generation,
            **others,
        )
        ends = generation.eos_token_id
        ends = {ends} if isinstance(ends, int) else set(ends or ())
        return [answer[: _first_of(ends, answer.tolist())] for answer in answers]


def without_adapters(model: nn.Module) -> PackedModel:
    """The model itself, where peft has put its own around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[return-value,operator]


def _first_of(tokens: set[int], answer: list[int]) -> int:
    """Where the first of `tokens` stands in an answer; its length if none does."""
    return next((place for place, token in enumerate(answer) if token in tokens), len(answer))
