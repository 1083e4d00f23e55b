"""The vision connector: learned queries read each slice into a fixed number of token embeddings.

Letters: S slices, P patches, Q queries, D the LLM's width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.modules.attention import Segments, to_device, varlen_attention

HEAD_DIM = 128


class Resampler(nn.Module):
    """Cross-attention from Q learned queries to the patches of a slice.

    Args:
        num_queries: Q, token places of one slice.
        embed_dim: D, a multiple of 4; heads are 128 wide (one head below that).
        kv_dim: width of the vision tower.
    """

    def __init__(self, *, num_queries: int, embed_dim: int, kv_dim: int):
        super().__init__()
        self.num_queries = num_queries
        self.query = nn.Parameter(torch.zeros(num_queries, embed_dim))
        self.kv_proj = nn.Linear(kv_dim, embed_dim, bias=False)
        self.attn = CrossAttention(embed_dim, max(embed_dim // HEAD_DIM, 1))
        self.ln_q = nn.LayerNorm(embed_dim, eps=1e-6)
        self.ln_kv = nn.LayerNorm(embed_dim, eps=1e-6)
        self.ln_post = nn.LayerNorm(embed_dim, eps=1e-6)
        self.proj = nn.Parameter(torch.zeros(embed_dim, embed_dim))

    def forward(self, features: Tensor, slice_sizes: Tensor) -> Tensor:
        """Token embeddings of each slice.

        Args:
            features: (P, kv_dim), patches of slice after slice, row by row.
            slice_sizes: int64 (S, 2) on the CPU: height and width in patches.

        Returns:
            (S·Q, D)
        """
        values = self.ln_kv(self.kv_proj(features))
        keys = values + position_embedding(slice_sizes, values.shape[-1], values.device).to(values.dtype)
        segments_k = Segments.of(slice_sizes.prod(dim=1).tolist(), features.device)
        segments_q = Segments.of([self.num_queries] * len(slice_sizes), features.device)
        hidden = self.attn(self.ln_q(self.query), keys, values, segments_q, segments_k)
        return self.ln_post(hidden) @ self.proj


class CrossAttention(nn.Module):
    """Attention with the parameters of `nn.MultiheadAttention`, over flat segments."""

    def __init__(self, embed_dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.zeros(3 * embed_dim, embed_dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * embed_dim))
        self.out_proj = nn.Linear(embed_dim, embed_dim)

    def forward(
        self, queries: Tensor, keys: Tensor, values: Tensor, segments_q: Segments, segments_k: Segments
    ) -> Tensor:
        """Every segment has the same `queries` (Q, D): keys and values (P, D) to (S·Q, D)."""
        q, k, v = (
            F.linear(x, weight, bias).unflatten(-1, (self.num_heads, -1))
            for x, weight, bias in zip(
                (queries, keys, values), self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3), strict=True
            )
        )
        q = q.repeat(len(segments_q.lengths), 1, 1)
        return self.out_proj(varlen_attention(q, k, v, segments_q, segments_k).flatten(1))


def position_embedding(slice_sizes: Tensor, embed_dim: int, device: torch.device) -> Tensor:
    """2-D sine-cosine embedding of each patch's column, then of its row: float32 (P, embed_dim).

    Computed for the slices at hand, so that a slice may be of any width or height.
    """
    heights_widths = slice_sizes.tolist()
    columns = torch.cat([torch.arange(width).repeat(height) for height, width in heights_widths])
    rows = torch.cat([torch.arange(height).repeat_interleave(width) for height, width in heights_widths])
    columns_rows = to_device(torch.stack([columns, rows], dim=1), device)
    exponents = torch.arange(embed_dim // 4, dtype=torch.float32, device=device) / (embed_dim // 4)
    angles = columns_rows[..., None] / 10000**exponents
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(1)
