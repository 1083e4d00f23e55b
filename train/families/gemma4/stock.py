"""Gemma 4 in transformers' own class, for comparisons."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Gemma4ForConditionalGeneration

from train.families.gemma4.towers import coordinates
from train.families.stock import Logits
from train.schema import Batch, Sample


def gemma4_logits(folder: Path) -> Logits:
    """Those of transformers' Gemma 4, in fp32."""
    model = Gemma4ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    side = model.config.vision_config.pooling_kernel_size
    return lambda batch: model(**stock_inputs(batch, side)).logits[0]


def stock_inputs(sample: Sample | Batch, side: int = 3) -> dict[str, Tensor]:
    """What transformers' model takes of one sample: images and clips padded to the largest.

    side: patches of a place, in a row.
    """
    inputs = {"input_ids": sample.input_ids[None]}
    if image := sample.media.get("image"):
        counts = image.sizes.prod(dim=1).tolist()
        at = [coordinates(rows, columns, side) for rows, columns in image.sizes.tolist()]
        pixels = (image.values * (1 / 255)).split(counts)
        inputs["pixel_values"] = torch.stack([F.pad(x, (0, 0, 0, max(counts) - len(x))) for x in pixels])
        inputs["image_position_ids"] = torch.stack([F.pad(x, (0, 0, 0, max(counts) - len(x)), value=-1) for x in at])
    if audio := sample.media.get("audio"):
        longest = int(audio.sizes.max())
        clips = audio.values.split(audio.sizes.tolist())
        inputs["input_features"] = torch.stack([F.pad(clip, (0, 0, 0, longest - len(clip))) for clip in clips])
        inputs["input_features_mask"] = torch.arange(longest) < audio.sizes[:, None]
    return inputs
