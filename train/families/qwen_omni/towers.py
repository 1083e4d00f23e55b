"""The vision and audio towers: transformers' own modules, over flat rows of images and clips.

transformers' towers loop over windows where no flash kernel is asked for; here a layer attends to all windows in one
call of our attention, whose segments say where each begins. Letters for shapes are those of `schema`.
"""

from collections.abc import Iterable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import (
    Qwen2_5OmniAudioEncoder,
    Qwen2_5OmniVisionEncoder,
    Qwen2_5OmniVisionRotaryEmbedding,
)
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

from train.modules.attention import ATTENTION_NAME, Segments
from train.modules.llm import ExactBuffers
from train.modules.towers import Tower

_GAP = 2
"""Zero frames before each window of a clip: they keep neighbours apart, and windows at even places for the stride."""


class PatchProjection(nn.Conv3d):
    """The patch convolution, applied to patches that are already cut out: one matrix product."""

    def forward(self, patches: Tensor) -> Tensor:
        """(U, channels, frames, patch, patch) to (U, D)."""
        return F.linear(patches.flatten(1), self.weight.flatten(1))


class VisionRotaryEmbedding(ExactBuffers, Qwen2_5OmniVisionRotaryEmbedding):
    """Whose frequencies stay float32 when the model is cast."""


class VisionTower(Tower, Qwen2_5OmniVisionEncoder):  # type: ignore[misc]  # `forward` is the tower's
    """Windowed vision transformer, and the merger of patches into places.

    Values are uint8 (U, 3·patch²), raw pixels channel by channel, in the published order: block by block of
    merge×merge patches. Sizes are (I, 2): height and width of an image in patches.
    """

    def __init__(self, config: Any):
        config._attn_implementation = ATTENTION_NAME
        super().__init__(config)
        self.patch_size: int = config.patch_size
        size = (config.temporal_patch_size, config.patch_size, config.patch_size)
        self.patch_embed.proj = PatchProjection(config.in_channels, config.hidden_size, size, stride=size, bias=False)
        self.rotary_pos_emb = VisionRotaryEmbedding(config)

    def features(self, values: Tensor, sizes: Tensor) -> Tensor:
        """Features of each patch: (U, the tower's width)."""
        merge, device = self.spatial_merge_size, values.device
        grids = F.pad(sizes, (1, 0), value=1)  # an image is one frame
        blocks, window_ends = get_vision_window_index(
            grids, spatial_merge_size=merge, window_size=self.window_size, patch_size=self.patch_size
        )
        order = (blocks[:, None] * merge**2 + torch.arange(merge**2)).flatten()
        at = get_vision_position_ids(grids, merge)[order].to(device, non_blocking=True)
        windows = Segments.of_cu_seqlens(window_ends, device)
        images = Segments.of(sizes.prod(dim=1).tolist(), device)
        pixels = normalised(values, cast(int, self.config.temporal_patch_size))
        hidden = self.patch_embed(pixels)[order.to(device, non_blocking=True)]
        turned = self.rotary_pos_emb(hidden, at)
        for number, block in enumerate(self.blocks):
            segments = images if number in self.fullatt_block_indexes else windows
            hidden = block(hidden, cu_seqlens=_whole(hidden), position_embeddings=turned, segments=segments)
        return hidden[order.argsort().to(device, non_blocking=True)]

    def connect(self, features: Tensor, sizes: Tensor) -> Tensor:
        """Token embeddings of each image: (U / merge², D)."""
        return self.merger(features)

    def encoder_parameters(self) -> Iterable[nn.Parameter]:
        """All but the merger's."""
        return (value for name, value in self.named_parameters() if not name.startswith("merger."))

    def dummy(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """A black image of one place."""
        merge = self.spatial_merge_size
        values = torch.zeros(merge**2, 3 * self.patch_size**2, dtype=torch.uint8, device=device)
        return values, torch.tensor([[merge, merge]])


def normalised(values: Tensor, frames: int = 2) -> Tensor:
    """Pixels as the tower takes them, the frame twice: (U, 3·2·patch²)."""
    mean, std = (torch.tensor(of, device=values.device)[:, None] for of in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    pixels = (values.unflatten(1, (3, -1)) / 255 - mean) / std
    return pixels[:, :, None].expand(-1, -1, frames, -1).flatten(1)


class AudioTower(Tower, Qwen2_5OmniAudioEncoder):  # type: ignore[misc]  # `forward` is the tower's
    """Whisper's encoder over windows of 2 s, its frames averaged two by two, and their projection.

    Values are float32 (U, B), log-mel frames; sizes are (I,): frames of each clip, at least 3.
    """

    def __init__(self, config: Any):
        config._attn_implementation = ATTENTION_NAME
        super().__init__(config)

    def features(self, values: Tensor, sizes: Tensor) -> Tensor:
        """Normed means of the encoder's frames: (places, the encoder's width)."""
        windows = [part for frames in sizes.tolist() for part in _parts(frames, 2 * self.n_window)]
        encoded = [_halved(frames) for frames in windows]
        hidden = self._convolve(values.to(self.conv1.weight.dtype).T, windows)
        table = self.positional_embedding.positional_embedding
        hidden = hidden + torch.cat([table[:frames] for frames in encoded]).to(hidden.dtype)
        segments = Segments.of(encoded, values.device)
        for layer in self.layers:
            hidden = layer(hidden, cu_seqlens=_whole(hidden), segments=segments)[0]
        clips = hidden.split([_halved(frames) for frames in sizes.tolist()])
        pairs = torch.cat([clip[: len(clip) - len(clip) % 2] for clip in clips]).unflatten(0, (-1, 2))
        return self.ln_post(pairs.mean(dim=1))

    def connect(self, features: Tensor, sizes: Tensor) -> Tensor:
        """Token embeddings of each clip: (places, D)."""
        return self.proj(features)

    def encoder_parameters(self) -> Iterable[nn.Parameter]:
        """All but the projection's."""
        return (value for name, value in self.named_parameters() if not name.startswith("proj."))

    def dummy(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """A clip of one place."""
        return torch.zeros(4, self.num_mel_bins, device=device), torch.tensor([4])

    def _convolve(self, mel: Tensor, windows: list[int]) -> Tensor:
        """Both convolutions over all windows at once: (B, U) to half as many rows, each window as if alone."""
        row = torch.cat([F.pad(part, (_GAP, part.shape[1] % 2)) for part in mel.split(windows, dim=1)], dim=1)
        is_window = torch.cat([F.pad(torch.ones(frames), (_GAP, frames % 2)) for frames in windows]).bool()
        hidden = F.gelu(self.conv1(row[None]))
        # The convolution has written into the gaps; the next one must find zeros there, as at a window's edge.
        hidden = F.gelu(self.conv2(hidden.where(is_window.to(mel.device, non_blocking=True), 0.0)))
        gap = _GAP // 2
        return torch.cat([part[gap:] for part in hidden[0].T.split([gap + _halved(frames) for frames in windows])])


def _parts(length: int, most: int) -> list[int]:
    """A length in parts of `most`, the last as long as it comes."""
    return [min(most, length - begin) for begin in range(0, length, most)]


def _halved(frames: int) -> int:
    """Frames that a convolution of stride 2 leaves."""
    return (frames + 1) // 2


def _whole(hidden: Tensor) -> Tensor:
    """The row as one piece: transformers' layers then hand it to our attention as it is."""
    return torch.tensor([0, len(hidden)])
