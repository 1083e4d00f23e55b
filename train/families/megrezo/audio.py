"""The audio tower: Whisper's encoder over clips of any length, and its connector to the LLM.

Letters: C clips, F mel frames (10 ms), B mel bins, D the LLM's width. Clips lie one after the other in
one flat row, unpadded: what a clip becomes does not depend on the others.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from train.modules.attention import Segments, to_device, varlen_attention

_GAP = 2
"""Zero frames before each clip: they keep neighbours apart, and clips at even places for the stride of 2."""


class AudioEncoder(nn.Module):
    """Whisper's encoder, average pooling, and the projection to token embeddings.

    Args:
        n_mels: B
        n_ctx: frames of the longest clip after the convolutions (20 ms each).
        n_state: the encoder's width, even.
        output_dim: D
        avg_pool: encoder frames that become one token place (see `geometry.pool_factor`).
        add_audio_bos_eos_token: whether learned begin and end embeddings enclose each clip.
    """

    positional_embedding: Tensor

    def __init__(
        self,
        *,
        n_mels: int,
        n_ctx: int,
        n_state: int,
        n_head: int,
        n_layer: int,
        output_dim: int,
        avg_pool: int = 2,
        add_audio_bos_eos_token: bool = True,
    ):
        super().__init__()
        self.avg_pool = avg_pool
        self.conv1 = nn.Conv1d(n_mels, n_state, kernel_size=3, padding=1)
        self.conv2 = nn.Conv1d(n_state, n_state, kernel_size=3, stride=2, padding=1)
        # A buffer: it belongs to the checkpoint, and nothing can train it.
        self.register_buffer("positional_embedding", sinusoids(n_ctx, n_state))
        self.blocks = nn.ModuleList(AudioBlock(n_state, n_head) for _ in range(n_layer))
        self.ln_post = nn.LayerNorm(n_state)
        self.proj = nn.Linear(n_state, output_dim)
        self.audio_bos_eos_token = nn.Embedding(2, output_dim) if add_audio_bos_eos_token else None

    def forward(self, mel: Tensor, clip_frames: Tensor) -> Tensor:
        """Token embeddings of each clip.

        Args:
            mel: float32 (F, B), log-mel frames, clip after clip.
            clip_frames: int64 (C,) on the CPU: frames of each clip, even, from 2·avg_pool to 2·n_ctx.

        Returns:
            (places, D): of each clip the begin embedding, its F // 2 // avg_pool frames, the end embedding.
        """
        return self.connect(self.features(mel, clip_frames), clip_frames)

    def features(self, mel: Tensor, clip_frames: Tensor) -> Tensor:
        """Normed means of the encoder's frames: (F // 2 // avg_pool of each clip, n_state)."""
        frames = (clip_frames // 2).tolist()
        hidden = self._convolve(mel.to(self.conv1.weight.dtype).T, clip_frames.tolist())
        hidden = hidden + torch.cat([self.positional_embedding[:length] for length in frames]).to(hidden.dtype)
        segments = Segments.of(frames, mel.device)
        for block in self.blocks:
            hidden = block(hidden, segments)
        return self.ln_post(self._pool(hidden, frames))

    def connect(self, features: Tensor, clip_frames: Tensor) -> Tensor:
        """Token embeddings (places, D) of the features, each clip between the begin and the end embedding."""
        projected = self.proj(features)
        if self.audio_bos_eos_token is None:
            return projected
        bos, eos = self.audio_bos_eos_token(torch.arange(2, device=features.device)).to(projected.dtype).split(1)
        clips = projected.split((clip_frames // 2 // self.avg_pool).tolist())
        return torch.cat([piece for clip in clips for piece in (bos, clip, eos)])

    def projector_parameters(self) -> Iterator[nn.Parameter]:
        """What `connect` uses."""
        yield from self.proj.parameters()
        if self.audio_bos_eos_token is not None:
            yield from self.audio_bos_eos_token.parameters()

    def places(self, clip_frames: Tensor) -> Tensor:
        """Token places of each clip, int64 (C,)."""
        return clip_frames // 2 // self.avg_pool + 2 * (self.audio_bos_eos_token is not None)

    def _convolve(self, mel: Tensor, clip_frames: list[int]) -> Tensor:
        """Both convolutions over all clips at once: (B, F) to (F / 2, n_state), each clip as if alone."""
        row = torch.cat([F.pad(clip, (_GAP, 0)) for clip in mel.split(clip_frames, dim=1)], dim=1)
        is_clip = torch.cat([torch.arange(_GAP + length) >= _GAP for length in clip_frames])
        is_clip = to_device(is_clip, mel.device)
        hidden = F.gelu(self.conv1(row[None]))
        # The convolution has written into the gaps; the next one must find zeros there, as at a clip's edge.
        hidden = F.gelu(self.conv2(hidden.where(is_clip, 0.0)))
        gap, rows = _GAP // 2, hidden[0].T
        return torch.cat([clip[gap:] for clip in rows.split([gap + length // 2 for length in clip_frames])])

    def _pool(self, hidden: Tensor, frames: list[int]) -> Tensor:
        """Means of `avg_pool` frames; those left over at a clip's end are dropped."""
        whole = [length - length % self.avg_pool for length in frames]
        kept = torch.cat([clip[:n] for clip, n in zip(hidden.split(frames), whole, strict=True)])
        return kept.unflatten(0, (-1, self.avg_pool)).mean(dim=1)


class AudioBlock(GradientCheckpointingLayer):
    """Pre-norm transformer layer of Whisper."""

    def __init__(self, n_state: int, n_head: int):
        super().__init__()
        self.attn = AudioAttention(n_state, n_head)
        self.attn_ln = nn.LayerNorm(n_state)
        self.mlp = nn.Sequential(nn.Linear(n_state, 4 * n_state), nn.GELU(), nn.Linear(4 * n_state, n_state))
        self.mlp_ln = nn.LayerNorm(n_state)

    def forward(self, hidden: Tensor, segments: Segments) -> Tensor:
        hidden = hidden + self.attn(self.attn_ln(hidden), segments)
        return hidden + self.mlp(self.mlp_ln(hidden))


class AudioAttention(nn.Module):
    """Self-attention of Whisper: keys have no bias."""

    def __init__(self, n_state: int, n_head: int):
        super().__init__()
        self.n_head = n_head
        self.query = nn.Linear(n_state, n_state)
        self.key = nn.Linear(n_state, n_state, bias=False)
        self.value = nn.Linear(n_state, n_state)
        self.out = nn.Linear(n_state, n_state)

    def forward(self, hidden: Tensor, segments: Segments) -> Tensor:
        q, k, v = (
            projection(hidden).unflatten(-1, (self.n_head, -1)) for projection in (self.query, self.key, self.value)
        )
        return self.out(varlen_attention(q, k, v, segments).flatten(1))


def sinusoids(length: int, channels: int) -> Tensor:
    """Whisper's table of positions, sines then cosines: float32 (length, channels)."""
    steps = math.log(10000) / (channels // 2 - 1)
    rates = torch.exp(-steps * torch.arange(channels // 2, dtype=torch.float32))
    angles = torch.arange(length, dtype=torch.float32)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)
