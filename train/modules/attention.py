"""Attention over segments of a flat row: one function for the LLM, the towers and the resampler.

On CUDA in half precision, from Ampere on, it is torch's variable-length kernel; elsewhere SDPA, one call for each
distinct length. Nothing is padded, no mask is built, and a segment's output does not depend on its
neighbours.

The same function serves transformers' Llama under the attention name "omnitune": a forward that is
given `segments` attends within them, any other forward (generation with its cache and padding mask)
is plain SDPA.
"""

import inspect
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION_NAME = "omnitune"
"""`attn_implementation` under which transformers finds this attention."""

# torch 2.11 takes grouped heads as they are, later versions want to be told.
_GROUPED_HEADS = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


@dataclass(frozen=True)
class Segments:
    """The lengths of the segments of a flat row, known to the host and to the device alike.

    The host's copy is what shapes are made of, so that nothing waits for the device.
    """

    lengths: tuple[int, ...]
    """tokens of each segment, each at least 1"""
    cu_seqlens: Tensor
    """int32 (N + 1,) on the device: where each segment begins, and the end"""
    longest: int
    """tokens of the longest segment; a field, since torch.compile breaks its graph at a cached property"""

    @classmethod
    def of(cls, lengths: list[int], device: torch.device) -> "Segments":
        """Segments of these lengths, one after the other."""
        ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        return cls(tuple(lengths), to_device(ends, device), max(lengths))

    @classmethod
    def of_cu_seqlens(cls, cu_seqlens: Tensor, device: torch.device) -> "Segments":
        """Segments between cumulative lengths, int32 (N + 1,); waits for the device if they lie on one."""
        lengths = cu_seqlens.diff().tolist()
        return cls(tuple(lengths), cu_seqlens.to(device, non_blocking=True), max(lengths))


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """What the host has made, on the device, without a wait (which pageable memory may cost)."""
    return (values if values.device == device else values.pin_memory()).to(device, non_blocking=True)


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments_q: Segments,
    segments_k: Segments | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Scaled dot-product attention of each segment of queries to the segment of keys of the same number.

    Args:
        q: (T, H, Dh); on CUDA in half precision Dh is a multiple of 8.
        k, v: (T', Hkv, Dh), where Hkv divides H.
        segments_k: segments of `k` and `v`; None means those of `q`.
        causal: a token sees itself and what comes before it in its segment.
        scale: None means 1/√Dh.

    Returns:
        (T, H, Dh)
    """
    segments_k = segments_k or segments_q
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and _has_varlen_kernel(q.device):
        options: dict[str, Any] = {"scale": scale, "window_size": (-1, 0) if causal else (-1, -1)}
        if q.shape[1] != k.shape[1]:
            options |= _GROUPED_HEADS
        lengths = (segments_q.cu_seqlens, segments_k.cu_seqlens, segments_q.longest, segments_k.longest)
        return cast(Tensor, varlen_attn(q, k, v, *lengths, **options))
    return _attention_by_length(q, k, v, segments_q, segments_k, causal=causal, scale=scale)


@lru_cache
def _has_varlen_kernel(device: torch.device) -> bool:
    """Whether the GPU is an Ampere or later: on older ones the kernel crashes."""
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _attention_by_length(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments_q: Segments,
    segments_k: Segments,
    *,
    causal: bool,
    scale: float | None,
) -> Tensor:
    """The same by SDPA: segments of equal lengths share a call, and the outputs are put back in order."""
    if (repeats := q.shape[1] // k.shape[1]) > 1:
        # Not `enable_gqa`: in float32 on CUDA that falls back to a T×T matrix.
        k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
    numbers_of: dict[tuple[int, int], list[int]] = {}
    for number, lengths in enumerate(zip(segments_q.lengths, segments_k.lengths, strict=True)):
        numbers_of.setdefault(lengths, []).append(number)

    pieces = [x.split(s.lengths) for x, s in ((q, segments_q), (k, segments_k), (v, segments_k))]
    outputs: list[Tensor] = [q] * len(segments_q.lengths)
    for numbers in numbers_of.values():
        q_n, k_n, v_n = (torch.stack([piece[n] for n in numbers]).transpose(1, 2) for piece in pieces)
        out = F.scaled_dot_product_attention(q_n, k_n, v_n, is_causal=causal, scale=scale).transpose(1, 2)
        for number, output in zip(numbers, out.unbind(), strict=True):
            outputs[number] = output
    return torch.cat(outputs)


def llm_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    segments: Segments | None = None,
    scaling: float | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """What transformers' Llama calls: (1, H, T, Dh) with `segments` is a pack; without them it is "sdpa".

    A pack is causal and without dropout.
    """
    if segments is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    return varlen_attention(q, k, v, segments, causal=True, scale=scaling).unsqueeze(0), None


AttentionInterface.register(ATTENTION_NAME, llm_attention)
AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)
