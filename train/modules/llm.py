"""The Llama inside every model of the project: transformers' own, made to run over packs."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from train.modules.attention import ATTENTION_NAME, Segments


class ExactBuffers(nn.Module):
    """Mixed into a module whose buffers stay float32 when the model is cast."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ExactBuffers":
        exact = {name: buffer for name, buffer in self.named_buffers() if not buffer.is_meta}
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            path, _, attribute = name.rpartition(".")
            setattr(self.get_submodule(path), attribute, buffer.to(self.get_buffer(name).device))
        return self


class RotaryEmbedding(ExactBuffers, LlamaRotaryEmbedding):
    """Llama's rotary embedding with exact frequencies.

    In bfloat16, as `model.bfloat16()` (and so DeepSpeed) leaves them, angles are wrong by radians after some
    hundred tokens.
    """


def build_llm(config: LlamaConfig) -> LlamaForCausalLM:
    """The Llama of this configuration, random weights, with packed attention (see `attention`)."""
    config._attn_implementation = ATTENTION_NAME
    llm = LlamaForCausalLM(config)
    llm.model.rotary_emb = RotaryEmbedding(config)
    return llm


def packed_hidden_states(
    llm: LlamaForCausalLM, embeddings: Tensor, position_ids: Tensor, segments: Segments, **others: Tensor
) -> Tensor:
    """Final hidden states of samples that share a flat row; no sample sees another.

    Args:
        embeddings: (T, D)
        position_ids: int64 (T,), or (R, T) for a model of several rows; starting again at 0 with each sample.
        segments: the samples' lengths.
        others: what else the model takes, as it takes it.

    Returns:
        (T, D), normed: what the head takes.
    """
    # transformers hands on a mask of four dimensions as it is, where else it would derive a T×T one from
    # the positions.
    no_mask = torch.empty(1, 1, 0, 0, dtype=torch.bool, device=embeddings.device)
    out = llm.model(
        inputs_embeds=embeddings.unsqueeze(0),
        position_ids=position_ids.unsqueeze(-2),
        attention_mask=no_mask,
        use_cache=False,
        segments=segments,
        **others,
    )
    return out.last_hidden_state.squeeze(0)
