"""The vision tower: SigLIP over slices of any shape, their patches in one flat row.

Letters: S slices, P patches, D the tower's width.
"""

from collections.abc import Iterable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from train.modules.attention import Segments, to_device, varlen_attention


class VisionTower(nn.Module):
    """SigLIP as NaViT runs it: every slice keeps its shape, and sees only itself.

    Args:
        hidden_size: D, divisible by `num_attention_heads`.
        patch_size: pixels of a patch's side.
        image_size: pixels of a side of the image that the position table was made for.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        intermediate_size: int,
        num_hidden_layers: int,
        num_attention_heads: int,
        patch_size: int,
        image_size: int,
        layer_norm_eps: float = 1e-6,
    ):
        super().__init__()
        self.embeddings = PatchEmbeddings(hidden_size, patch_size, image_size // patch_size)
        self.encoder = VisionEncoder(
            VisionLayer(hidden_size, intermediate_size, num_attention_heads, layer_norm_eps)
            for _ in range(num_hidden_layers)
        )
        self.post_layernorm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)

    def forward(self, patches: Tensor, slice_sizes: Tensor) -> Tensor:
        """Features of each patch.

        Args:
            patches: uint8 (P, 3·patch²), raw pixels, channel by channel.
            slice_sizes: int64 (S, 2) on the CPU: height and width in patches.

        Returns:
            (P, D)
        """
        segments = Segments.of(slice_sizes.prod(dim=1).tolist(), patches.device)
        hidden = self.encoder(self.embeddings(patches, slice_sizes), segments)
        return self.post_layernorm(hidden)


class PatchProjection(nn.Conv2d):
    """The patch convolution, applied to patches that are already cut out: one matrix product."""

    def forward(self, patches: Tensor) -> Tensor:
        """(P, 3·patch²) to (P, D)."""
        return F.linear(patches, self.weight.flatten(1), self.bias)


class PatchEmbeddings(nn.Module):
    """Projected patches plus the learned embedding of their place in the image.

    `side` is the number of rows, and of columns, of the position table.
    """

    def __init__(self, hidden_size: int, patch_size: int, side: int):
        super().__init__()
        self.side = side
        self.patch_embedding = PatchProjection(3, hidden_size, kernel_size=patch_size, stride=patch_size)
        self.position_embedding = nn.Embedding(side**2, hidden_size)

    def forward(self, patches: Tensor, slice_sizes: Tensor) -> Tensor:
        pixels = ((patches.float() - 127.5) / 127.5).to(self.patch_embedding.weight.dtype)
        positions = torch.cat([self._positions(height, width) for height, width in slice_sizes.tolist()])
        return self.patch_embedding(pixels) + self.position_embedding(to_device(positions, patches.device))

    def _positions(self, height: int, width: int) -> Tensor:
        """Rows of the position table for a slice of height×width patches, row by row."""
        buckets_h, buckets_w = axis_buckets(height, self.side), axis_buckets(width, self.side)
        return (buckets_h[:, None] * self.side + buckets_w).flatten()


@lru_cache(maxsize=1024)
def axis_buckets(patches: int, side: int) -> Tensor:
    """The bucket, of `side` ones, of each of the patches along an axis: int64 (patches,).

    Rounding is part of the published function, where the length is an integer tensor: 1 / length is float32
    before arange sees it. A Python number gives other buckets for some lengths (25, 49 and 50 among them).
    """
    boundaries = torch.arange(1 / side, 1.0, 1 / side, dtype=torch.float32, device="cpu")
    step = 1 / torch.tensor(patches, device="cpu")
    fractions = torch.arange(0, 1 - 1e-6, step.item(), dtype=torch.float32, device="cpu")
    return torch.bucketize(fractions, boundaries, right=True)


class VisionEncoder(nn.Module):
    """The layers in a row: (P, D) to (P, D)."""

    def __init__(self, layers: Iterable["VisionLayer"]):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, hidden: Tensor, segments: Segments) -> Tensor:
        for layer in self.layers:
            hidden = layer(hidden, segments)
        return hidden


class VisionLayer(GradientCheckpointingLayer):
    """Pre-norm transformer layer: (P, D) to (P, D)."""

    def __init__(self, hidden_size: int, intermediate_size: int, num_heads: int, eps: float):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(hidden_size, eps=eps)
        self.self_attn = VisionAttention(hidden_size, num_heads)
        self.layer_norm2 = nn.LayerNorm(hidden_size, eps=eps)
        self.mlp = VisionMLP(hidden_size, intermediate_size)

    def forward(self, hidden: Tensor, segments: Segments) -> Tensor:
        hidden = hidden + self.self_attn(self.layer_norm1(hidden), segments)
        return hidden + self.mlp(self.layer_norm2(hidden))


class VisionAttention(nn.Module):
    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(hidden_size, hidden_size)
        self.k_proj = nn.Linear(hidden_size, hidden_size)
        self.v_proj = nn.Linear(hidden_size, hidden_size)
        self.out_proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, hidden: Tensor, segments: Segments) -> Tensor:
        q, k, v = (
            projection(hidden).unflatten(-1, (self.num_heads, -1))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(varlen_attention(q, k, v, segments).flatten(1))


class VisionMLP(nn.Module):
    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, intermediate_size)
        self.fc2 = nn.Linear(intermediate_size, hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(hidden), approximate="tanh"))
