"""The plain way to the same loss, over the same weights: everything padded, logits for every position.

Slices are padded to the largest of the batch, clips to its longest, conversations to its longest; a mask keeps
the padding out. (A clip is padded to the batch's longest, as the published code crops it, not to 30 s: that
would be dearer still.) Each saving of the packed step can be switched on alone.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from train.families.megrezo.audio import AudioEncoder
from train.families.megrezo.model import MegrezO
from train.families.megrezo.resampler import Resampler, position_embedding
from train.families.megrezo.vision import VisionTower
from train.modules.attention import Segments
from train.modules.llm import packed_hidden_states
from train.modules.loss import token_losses
from train.schema import IGNORE_INDEX, Batch


@dataclass(frozen=True)
class Savings:
    """What is not wasted: rows without padding, slices and clips without padding, the head only where it is asked."""

    packing: bool = False
    images: bool = False
    clips: bool = False
    head: bool = False


def loss_sum(model: MegrezO, batch: Batch, savings: Savings) -> Tensor:
    """Sum of the cross-entropies of all supervised tokens, float32, with its graph."""
    if savings == Savings(True, True, True, True):
        return model(batch=batch).loss_sum
    embeddings = model.get_input_embeddings()(batch.input_ids)
    if "image" in batch.media:
        media = (batch.media["image"].values, batch.media["image"].sizes)
        seen = model.vision(*media) if savings.images else see_padded(model, *media)
        embeddings = embeddings.index_copy(0, batch.media["image"].places, seen)
    if "audio" in batch.media:
        clips = (batch.media["audio"].values, batch.media["audio"].sizes)
        heard = model.audio(*clips) if savings.clips else hear_padded(model.audio.audio, *clips)
        embeddings = embeddings.index_copy(0, batch.media["audio"].places, heard)
    # the token that each position predicts
    labels = torch.full_like(batch.input_ids, IGNORE_INDEX).index_copy(0, batch.target_positions, batch.targets)
    if savings.packing:
        segments = Segments.of_cu_seqlens(batch.cu_seqlens, embeddings.device)
        hidden = packed_hidden_states(model.llm, embeddings, batch.position_ids, segments)
    else:
        lengths = batch.cu_seqlens.diff().tolist()
        rows, is_token = pad(embeddings, lengths)
        hidden = model.llm.model(inputs_embeds=rows, attention_mask=is_token.long(), use_cache=False).last_hidden_state
        labels = pad_sequence(list(labels.split(lengths)), batch_first=True, padding_value=IGNORE_INDEX)
    if savings.head:
        is_supervised = labels != IGNORE_INDEX
        return token_losses(hidden[is_supervised], model.llm.lm_head.weight, labels[is_supervised]).sum()
    logits = model.llm.lm_head(hidden).float().flatten(0, -2)
    return F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")


def pad(flat: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Segments of a flat row (T, D) as rows (N, L, D), and where they are real: bool (N, L)."""
    is_real = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return pad_sequence(list(flat.split(lengths)), batch_first=True), is_real.to(flat.device)


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, is_key: Tensor) -> Tensor:
    """Attention of rows (N, L, D) to the keys that are real."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=is_key[:, None, None]).transpose(1, 2).flatten(2)


def see_padded(model: MegrezO, patches: Tensor, slice_sizes: Tensor) -> Tensor:
    """What `model.vision` gives, (S·Q, D), by way of slices padded to the largest."""
    features, is_patch = _padded_tower(model.vision.vpm, patches, slice_sizes)
    return _padded_resampler(model.vision.resampler, features, is_patch, slice_sizes)


def _padded_tower(tower: VisionTower, patches: Tensor, slice_sizes: Tensor) -> tuple[Tensor, Tensor]:
    hidden, is_patch = pad(tower.embeddings(patches, slice_sizes), slice_sizes.prod(dim=1).tolist())
    layer: Any
    for layer in tower.encoder.layers:
        attention, normed = layer.self_attn, layer.layer_norm1(hidden)
        q, k, v = attention.q_proj(normed), attention.k_proj(normed), attention.v_proj(normed)
        hidden = hidden + attention.out_proj(attend(q, k, v, attention.num_heads, is_patch))
        hidden = hidden + layer.mlp(layer.layer_norm2(hidden))
    return tower.post_layernorm(hidden), is_patch


def _padded_resampler(resampler: Resampler, features: Tensor, is_patch: Tensor, slice_sizes: Tensor) -> Tensor:
    values = resampler.ln_kv(resampler.kv_proj(features))
    places = position_embedding(slice_sizes, values.shape[-1], values.device).to(values.dtype)
    keys = values + pad(places, slice_sizes.prod(dim=1).tolist())[0]
    queries = resampler.ln_q(resampler.query).expand(len(slice_sizes), -1, -1)
    attention = resampler.attn
    weights, biases = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
    q, k, v = (F.linear(x, w, b) for x, w, b in zip((queries, keys, values), weights, biases, strict=True))
    hidden = attention.out_proj(attend(q, k, v, attention.num_heads, is_patch))
    return (resampler.ln_post(hidden) @ resampler.proj).flatten(0, 1)


def hear_padded(encoder: AudioEncoder, mel: Tensor, clip_frames: Tensor) -> Tensor:
    """What `model.audio` gives, (places, D), by way of clips padded to the longest."""
    rows, is_mel = pad(mel.to(encoder.conv1.weight.dtype), clip_frames.tolist())
    hidden = F.gelu(encoder.conv1(rows.transpose(1, 2))).where(is_mel[:, None], 0.0)
    hidden = F.gelu(encoder.conv2(hidden)).transpose(1, 2)
    is_frame = is_mel[:, ::2]
    hidden = hidden + encoder.positional_embedding[: hidden.shape[1]].to(hidden.dtype)
    block: Any
    for block in encoder.blocks:
        attention, normed = block.attn, block.attn_ln(hidden)
        q, k, v = attention.query(normed), attention.key(normed), attention.value(normed)
        hidden = hidden + attention.out(attend(q, k, v, attention.n_head, is_frame))
        hidden = hidden + block.mlp(block.mlp_ln(hidden))
    whole = hidden.shape[1] - hidden.shape[1] % encoder.avg_pool
    pooled = encoder.proj(encoder.ln_post(hidden[:, :whole].unflatten(1, (-1, encoder.avg_pool)).mean(dim=2)))
    counts = (clip_frames // 2 // encoder.avg_pool).tolist()
    clips = [clip[:count] for clip, count in zip(pooled, counts, strict=True)]
    assert encoder.audio_bos_eos_token is not None
    bos, eos = encoder.audio_bos_eos_token.weight.split(1)
    return torch.cat([piece for clip in clips for piece in (bos, clip, eos)])
