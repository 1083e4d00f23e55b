"""The thinker in transformers' own class, for comparisons."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Qwen2_5OmniThinkerForConditionalGeneration

from train.families.qwen_omni.towers import normalised
from train.families.stock import Logits
from train.schema import Batch, Sample


def thinker_logits(folder: Path) -> Logits:
    """Those of transformers' thinker, in fp32."""
    model = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    return lambda batch: model(**stock_inputs(batch)).logits[0]


def stock_inputs(sample: Sample | Batch) -> dict[str, Tensor]:
    """What transformers' model takes of one sample: pixels normed, clips padded, and its own positions."""
    inputs = {"input_ids": sample.input_ids[None], "attention_mask": torch.ones_like(sample.input_ids)[None]}
    if image := sample.media.get("image"):
        inputs["pixel_values"] = normalised(image.values)
        inputs["image_grid_thw"] = F.pad(image.sizes, (1, 0), value=1)
    if audio := sample.media.get("audio"):
        longest = int(audio.sizes.max())
        clips = audio.values.split(audio.sizes.tolist())
        inputs["input_features"] = torch.stack([F.pad(clip.T, (0, longest - len(clip))) for clip in clips])
        inputs["feature_attention_mask"] = (torch.arange(longest) < audio.sizes[:, None]).long()
    return inputs
