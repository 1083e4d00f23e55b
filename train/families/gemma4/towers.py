"""The vision and audio towers: transformers' own layers, over flat rows of images and clips.

Letters for shapes are those of `schema`. The parts of a tower lie apart in the published model (`vision_tower` and
`embed_vision`, ...), so a `GemmaTower` only holds them together.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.gemma4.modeling_gemma4 import (
    Gemma4AudioLayer,
    Gemma4AudioRelPositionalEncoding,
    Gemma4AudioSubSampleConvProjection,
    Gemma4MultimodalEmbedder,
    Gemma4PreTrainedModel,
    Gemma4VisionModel,
)

from train.families.gemma4.config import MEL_BINS
from train.families.gemma4.geometry import clip_places, halved
from train.modules.attention import ATTENTION_NAME, Segments, to_device
from train.modules.towers import Tower


class VisionEncoder(Gemma4VisionModel):
    """Vision transformer, its patches averaged k×k to a place.

    Values are uint8 (U, 3·patch²), raw pixels channel by channel within a pixel, block by block of k×k patches.
    Sizes are (I, 2): height and width of an image in patches.
    """

    def __init__(self, config: Any):
        config._attn_implementation = ATTENTION_NAME
        super().__init__(config)

    def forward(self, values: Tensor, sizes: Tensor) -> Tensor:  # type: ignore[override]
        """Features of each place: (U / k², the tower's width)."""
        device, side = values.device, self.config.pooling_kernel_size
        # The published image processor's scale, a product, so that pixels are the same to the bit.
        pixels = (values * (1 / 255))[None]
        at = to_device(torch.cat([coordinates(rows, columns, side) for rows, columns in sizes.tolist()]), device)[None]
        none = torch.zeros(at.shape[:2], dtype=torch.bool, device=device)
        segments = Segments.of(sizes.prod(dim=1).tolist(), device)
        hidden = self.patch_embedder(pixels, at, none)
        turned = self.encoder.rotary_emb(hidden, at)
        for layer in self.encoder.layers:
            hidden = layer(hidden, position_embeddings=turned, position_ids=at, segments=segments)
        dtype = hidden.dtype
        pooled = hidden[0].unflatten(0, (-1, side**2)).float().mean(dim=1)
        pooled = pooled.to(dtype).float() * self.pooler.root_hidden_size
        if self.config.standardize:
            pooled = (pooled - self.std_bias.float()) * self.std_scale.float()
        return pooled.to(dtype)

    def dummy(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """A black image of one place."""
        side, pixels = self.config.pooling_kernel_size, 3 * self.config.patch_size**2
        return torch.zeros(side**2, pixels, dtype=torch.uint8, device=device), torch.tensor([[side, side]])


class ClipConv1d(nn.Conv1d):
    """The causal convolution over clips end to end, each as if alone; `spread` says where they lie."""

    spread: tuple[Tensor, Tensor]
    """for a row with zeros before each clip: which place each of its own is (the number of places where it is zero),
    and where what it sees of each place begins: (row,) and (1, places, 1), as torch.compile tells places' tensors"""

    def forward(self, x: Tensor) -> Tensor:
        """(1, D, places) to the same."""
        source, at = self.spread
        return super().forward(F.pad(x, (0, 1)).index_select(2, source)).index_select(2, at.flatten())


class AudioLayer(GradientCheckpointingLayer, Gemma4AudioLayer):
    """A conformer layer over clips end to end, which can be checkpointed (transformers' own cannot)."""

    def __init__(self, config: Any, layer_idx: int):
        super().__init__(config, layer_idx)
        width = config.hidden_size
        convolution: Any = ClipConv1d(width, width, config.conv_kernel_size, groups=width, bias=False)
        self.lconv1d.depthwise_conv1d = convolution

    def forward(self, hidden: Tensor, mask: Tensor, turned: Tensor, spread: tuple[Tensor, Tensor]) -> Tensor:  # type: ignore[override]
        """(1, places, D) to the same; mask: see `AudioEncoder._unseen`."""
        convolution: Any = self.lconv1d.depthwise_conv1d
        convolution.spread = spread
        block = self.self_attn.chunk_size
        rest = -hidden.shape[1] % block  # rows that the layer itself adds, and drops
        by_block = F.pad(mask, (0, 0, 0, rest)).unflatten(1, (-1, block))[None]
        return super().forward(hidden, attention_mask=by_block, position_embeddings=turned)


class RelativePositions(Gemma4AudioRelPositionalEncoding):
    """Whose frequencies are float32 whatever the model is loaded in."""

    def __init__(self, config: Any):
        super().__init__(config)
        self.inv_timescales = nn.Buffer(self.inv_timescales.float(), persistent=False)


class AudioEncoder(Gemma4PreTrainedModel):
    """Two convolutions, which leave a frame in four, and a conformer whose places see the last few of their clip.

    Values are float32 (U, B), log-mel frames; sizes are (I,): frames of each clip, at least 1.
    """

    def __init__(self, config: Any):
        super().__init__(config)
        self.subsample_conv_projection = Gemma4AudioSubSampleConvProjection(config)
        self.rel_pos_enc = RelativePositions(config)
        self.layers = nn.ModuleList([AudioLayer(config, index) for index in range(config.num_hidden_layers)])
        self.output_proj = nn.Linear(config.hidden_size, config.output_proj_dims, bias=True)
        self.post_init()

    def forward(self, values: Tensor, sizes: Tensor) -> Tensor:
        """Features of each place: (places, the tower's width)."""
        frames, device = sizes.tolist(), values.device
        places = [clip_places(count) for count in frames]
        hidden = self._subsampled(values, frames)[None]
        turned = self.rel_pos_enc(hidden)
        mask = to_device(self._unseen(places), device)
        gap = self.config.conv_kernel_size - 1
        at = _spread(places, [count + gap for count in places])
        source = torch.full((sum(places) + gap * len(places),), sum(places)).index_copy(
            0, at + gap, torch.arange(len(at))
        )
        spread = to_device(source, device), to_device(at[None, :, None], device)
        for layer in self.layers:
            hidden = layer(hidden, mask, turned, spread)
        return self.output_proj(hidden)[0]

    def dummy(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """A clip of one place."""
        return torch.zeros(1, MEL_BINS, device=device), torch.tensor([1])

    def _subsampled(self, values: Tensor, frames: list[int]) -> Tensor:
        """Both convolutions over all clips at once, each as if alone: (places, D)."""
        # A frame of zeros behind each clip for either convolution, and clips where both strides begin.
        lengths = [4 * (halved(count) // 2 + 1) for count in frames]
        at = _spread(frames, lengths)
        is_frame = torch.zeros(sum(lengths), dtype=torch.bool)
        is_frame[at] = True
        row = values.new_zeros(sum(lengths), values.shape[1]).index_copy(0, to_device(at, values.device), values)
        hidden, _ = self.subsample_conv_projection(row[None], to_device(is_frame, values.device)[None])
        kept = _spread([clip_places(count) for count in frames], [length // 4 for length in lengths])
        return hidden[0].index_select(0, to_device(kept, values.device))

    def _unseen(self, places: list[int]) -> Tensor:
        """What each place does not see of its block and of what precedes that: bool (1, places, preceding + block)."""
        block, reach = self.config.attention_chunk_size, self.config.attention_context_left - 1
        clip = F.pad(torch.arange(len(places)).repeat_interleave(torch.tensor(places)), (reach, block), value=-1)
        seeing = torch.arange(sum(places))[:, None]
        seen = seeing // block * block + torch.arange(reach + block) - reach
        is_near = (seen <= seeing) & (seeing - seen < reach)
        return ~(is_near & (clip[seeing + reach] == clip[seen + reach]))[None]


class GemmaTower(Tower):
    """An encoder and its projector. It is no part of the model, which holds both under their published names."""

    def __init__(self, encoder: VisionEncoder | AudioEncoder, projector: Gemma4MultimodalEmbedder):
        super().__init__()
        self.encoder, self.projector = encoder, projector

    def features(self, values: Tensor, sizes: Tensor) -> Tensor:
        """What the encoder makes of each place: (places, the tower's width)."""
        return self.encoder(values, sizes)

    def connect(self, features: Tensor, sizes: Tensor) -> Tensor:
        """Token embeddings: (places, D)."""
        return self.projector(features)

    def dummy(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """An image or clip of one place."""
        return self.encoder.dummy(device)

    def encoder_parameters(self) -> Iterable[nn.Parameter]:
        """The encoder's."""
        return self.encoder.parameters()


def coordinates(rows: int, columns: int, side: int) -> Tensor:
    """Column and row of each patch of an image, block by block of side×side: int64 (patches, 2)."""
    shape = (rows // side, columns // side, side, side)
    y = torch.arange(rows).view(shape[0], 1, side, 1).expand(shape)
    x = torch.arange(columns).view(1, shape[1], 1, side).expand(shape)
    return torch.stack([x, y], dim=-1).view(-1, 2)


def _spread(counts: list[int], lengths: list[int]) -> Tensor:
    """Where the first `counts` of stretches of `lengths` lie: int64 (sum of counts,)."""
    starts = torch.tensor([0, *lengths[:-1]]).cumsum(0).tolist()
    return torch.cat([torch.arange(start, start + count) for start, count in zip(starts, counts, strict=True)])
