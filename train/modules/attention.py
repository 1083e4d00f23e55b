"""Attention over segments of a flat row: one function for the LLM, the towers and the resampler.

On CUDA in half precision, from Ampere on, it is torch's variable-length kernel; elsewhere, and for heads too wide for
it, SDPA, one call for each distinct length. Nothing is padded, only a sliding window is a mask, and a segment's output
does not depend on its neighbours. Either is a single operator to torch.compile, which so sees no lengths: they would be
constants of its graphs, and each pack a new graph.

The same function serves transformers' models and towers under the attention name "omnitune": a forward that is
given `segments` attends within them, any other forward (generation with its cache and padding mask)
is plain SDPA.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION_NAME = "omnitune"
"""`attn_implementation` under which transformers finds this attention."""

WIDEST_HEAD = 256
"""Dimensions of a head that the variable-length kernel takes."""

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
    window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """Scaled dot-product attention of each segment of queries to the segment of keys of the same number.

    Args:
        q: (T, H, Dh); on CUDA in half precision Dh is a multiple of 8.
        k, v: (T', Hkv, Dh), where Hkv divides H.
        segments_k: segments of `k` and `v`; None means those of `q`.
        causal: a token sees itself and what comes before it in its segment.
        window: of those, where causal, only the last so many tokens, itself among them; None means all.
        scale: None means 1/√Dh.

    Returns:
        (T, H, Dh)
    """
    assert causal or window is None, "only causal attention has a window"
    segments_k = segments_k or segments_q
    is_half = q.dtype in (torch.bfloat16, torch.float16)
    if q.is_cuda and is_half and q.shape[-1] <= WIDEST_HEAD and _has_varlen_kernel(q.device):
        left = -1 if window is None else window - 1
        options: dict[str, Any] = {"scale": scale, "window_size": (left, 0) if causal else (-1, -1)}
        if q.shape[1] != k.shape[1]:
            options |= _GROUPED_HEADS
        lengths = (segments_q.cu_seqlens, segments_k.cu_seqlens, segments_q.longest, segments_k.longest)
        return cast(Tensor, varlen_attn(q, k, v, *lengths, **options))
    if isinstance(q, FakeTensor):  # without values; a single operator holds what the kernel would
        ends = segments_q.cu_seqlens, segments_k.cu_seqlens
        return cast(Tensor, _opaque_attention(q, k, v, *ends, causal, window, scale)[0])
    return _attention_by_length(q, k, v, segments_q, segments_k, causal=causal, window=window, scale=scale)


def _attention_by_length(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments_q: Segments,
    segments_k: Segments,
    *,
    causal: bool,
    window: int | None,
    scale: float | None,
) -> Tensor:
    """The same by SDPA: segments of equal lengths share a call, and the outputs are put back in order."""
    if (repeats := q.shape[1] // k.shape[1]) > 1:
        # Not `enable_gqa`: in float32 on CUDA that falls back to a T×T matrix.
        k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
    if torch.compiler.is_compiling():
        out, _ = _opaque_attention(q, k, v, segments_q.cu_seqlens, segments_k.cu_seqlens, causal, window, scale)
        return out

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor]:
        outs = [
            F.scaled_dot_product_attention(
                q[..., rows, :], k[..., seen, :], v[..., seen, :], mask, is_causal=causal and mask is None, scale=scale
            )
            for rows, seen, mask in _blocks(q, k, window)
        ]
        return (outs[0] if len(outs) == 1 else torch.cat(outs, dim=-2),)

    return _by_length(attend, (q, segments_q.lengths), (k, segments_k.lengths), (v, segments_k.lengths))[0]


@torch.compiler.assume_constant_result
@lru_cache
def _has_varlen_kernel(device: torch.device) -> bool:
    """Whether the GPU is an Ampere or later: on older ones the kernel crashes."""
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _by_length(function: Callable[..., tuple[Tensor, ...]], *rows: tuple[Tensor, Sequence[int]]) -> tuple[Tensor, ...]:
    """What `function` makes of each segment: those of equal lengths share a call, results are put back in order.

    rows: (T, H, ...) and the lengths of its segments; `function` takes and returns (segments, H, length, ...).
    """
    numbers_of: dict[tuple[int, ...], list[int]] = {}
    for number, lengths in enumerate(zip(*(lengths for _, lengths in rows), strict=True)):
        numbers_of.setdefault(lengths, []).append(number)
    pieces = [x.split(list(lengths)) for x, lengths in rows]
    results: dict[int, tuple[Tensor, ...]] = {}
    for numbers in numbers_of.values():
        stacked = (torch.stack([piece[n] for n in numbers]).transpose(1, 2) for piece in pieces)
        found = zip(*(result.transpose(1, 2).unbind() for result in function(*stacked)), strict=True)
        results.update(zip(numbers, found, strict=True))
    return tuple(torch.cat(column) for column in zip(*(results[n] for n in range(len(results))), strict=True))


def _blocks(q: Tensor, k: Tensor, window: int | None) -> Iterator[tuple[slice, slice, Tensor | None]]:
    """The queries in blocks of `window`, what of the keys each block sees, and a mask to add; all at once without one.

    q, k: (..., length, Dh). A mask is (a block, its keys), so that memory grows with the length and not its square.
    """
    length = q.shape[-2]
    if window is None or window >= length:
        yield slice(0, length), slice(0, k.shape[-2]), None
        return
    for start in range(0, length, window):
        rows, seen = slice(start, min(start + window, length)), slice(max(start - window + 1, 0), start + window)
        behind = torch.arange(rows.start, rows.stop)[:, None] - torch.arange(seen.start, min(seen.stop, length))
        hidden = (behind < 0) | (behind >= window)
        yield rows, seen, torch.zeros(hidden.shape, dtype=q.dtype).masked_fill(hidden, -torch.inf).to(q.device)


@torch.library.custom_op("omnitune::attention", mutates_args=(), device_types="cpu")
def _opaque_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    causal: bool,
    window: int | None,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    """Attention by length as a single operator, on a CPU: (T, H, Dh), and float32 (T, H) for its backward."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        found = [
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q[..., rows, :],
                k[..., seen, :],
                v[..., seen, :],
                0.0,
                causal and mask is None,
                attn_mask=mask,
                scale=scale,
            )
            for rows, seen, mask in _blocks(q, k, window)
        ]
        outs, log_sums = zip(*found, strict=True)
        return torch.cat(outs, dim=2), torch.cat(log_sums, dim=2)

    lengths_q, lengths_k = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
    out, log_sums = _by_length(attend, (q, lengths_q), (k, lengths_k), (v, lengths_k))
    return out, log_sums


@_opaque_attention.register_fake
def _(q: Tensor, *_: Any):
    log_sums = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=log_sums)


@torch.library.custom_op("omnitune::attention_backward", mutates_args=(), device_types="cpu")
def _opaque_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    log_sums: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    causal: bool,
    window: int | None,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    def gradients(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sums: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for rows, seen, mask in _blocks(q, k, window):
            parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad[..., rows, :],
                *(q[..., rows, :], k[..., seen, :], v[..., seen, :]),
                *(out[..., rows, :], log_sums[..., rows]),
                *(0.0, causal and mask is None),
                attn_mask=mask,
                scale=scale,
            )
            grad_q[..., rows, :] = parts[0]
            grad_k[..., seen, :] += parts[1]
            grad_v[..., seen, :] += parts[2]
        return grad_q, grad_k, grad_v

    of_q, of_k = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
    rows = (grad, of_q), (q, of_q), (k, of_k), (v, of_k), (out, of_q), (log_sums, of_q)
    grad_q, grad_k, grad_v = _by_length(gradients, *rows)
    return grad_q, grad_k, grad_v


@_opaque_backward.register_fake
def _(grad, q, k, v, *_):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.causal, ctx.window, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, cu_seqlens_q, cu_seqlens_k, out, log_sums = ctx.saved_tensors
    how = ctx.causal, ctx.window, ctx.scale
    grads = _opaque_backward(grad, q, k, v, out, log_sums, cu_seqlens_q, cu_seqlens_k, *how)
    return *grads, None, None, None, None, None


_opaque_attention.register_autograd(_backward, setup_context=_keep_for_backward)


def llm_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    segments: Segments | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """What transformers' layers call: (1, H, T, Dh) with `segments` is a pack; without them it is "sdpa".

    A pack is causal where the layer is, as those of a language model are and those of a tower are not; it has no
    dropout. `sliding_window` is what a token sees; without segments, the mask says that too.
    """
    if segments is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    out = varlen_attention(q, k, v, segments, causal=bool(module.is_causal), window=sliding_window, scale=scaling)
    return out.unsqueeze(0), None


AttentionInterface.register(ATTENTION_NAME, llm_attention)
AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)
