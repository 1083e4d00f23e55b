"""The processor of Gemma 4: images, recordings and text."""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.models.gemma4.feature_extraction_gemma4 import Gemma4AudioFeatureExtractor
from transformers.models.gemma4.image_processing_pil_gemma4 import get_aspect_ratio_preserving_size

from train.data.audio import SAMPLE_RATE, name_of
from train.data.chat_template import Segment
from train.data.encoding import Medium, RecordProcessor, Tokens, load_tokenizer
from train.data.images import image_size
from train.errors import BadRecord, CheckpointError
from train.families.family import read_json
from train.families.gemma4.config import MEL_BINS
from train.families.gemma4.geometry import FRAME, HOP, LONGEST, clip_places, mel_frames
from train.families.gemma4.template import GEMMA4_TEMPLATE
from train.model_settings import count_faults, fixed_faults, refuse
from train.schema import file_of

IMAGE = ("<|image>", "<|image|>", "<image|>")
AUDIO = ("<|audio>", "<|audio|>", "<audio|>")

_FIXED = {
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": False,
    "resample": 3,
    "rescale_factor": 1 / 255,
    "feature_size": MEL_BINS,
    "sampling_rate": SAMPLE_RATE,
    "hop_length": HOP,
    "frame_length": FRAME,
    "padding_value": 0.0,
    "dither": 0.0,
}
"""The only values of these keys in processor_config.json: the model takes raw pixels, and places follow the frames."""

_SOUND = (
    *("min_frequency", "max_frequency", "preemphasis", "preemphasis_htk_flavor", "fft_overdrive"),
    *("input_scale_factor", "mel_floor", "per_bin_mean", "per_bin_stddev"),
)
"""Keys of the feature extractor that may have any value."""


@dataclass(frozen=True)
class ImageSettings:
    """How images are scaled and cut: patches of `patch_size`² pixels, `pooling_kernel_size`² of which make a place."""

    patch_size: int = 16
    pooling_kernel_size: int = 3
    max_soft_tokens: int = 280
    """Places to which an image is scaled, or just below: small ones are scaled up."""

    @classmethod
    def read(cls, stated: dict[str, Any]) -> "ImageSettings":
        """Of an image processor's settings."""
        found = {item.name: stated[item.name] for item in fields(cls) if stated.get(item.name) is not None}
        refuse([f"processor_config.json: {fault}" for fault in count_faults(found, tuple(found))])
        return cls(**found)

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """Rows and columns of patches of an image; BadRecord where it is too long and narrow."""
        most = self.max_soft_tokens * self.pooling_kernel_size**2
        try:
            rows, columns = get_aspect_ratio_preserving_size(
                height, width, self.patch_size, most, self.pooling_kernel_size
            )
        except ValueError:
            raise BadRecord(
                f"image: {width}x{height} pixels are too long and narrow for {self.max_soft_tokens} places; "
                "cut it into several"
            ) from None
        return rows // self.patch_size, columns // self.patch_size

    def patches(self, image: Image.Image) -> tuple[Tensor, Tensor]:
        """The image's patches, uint8 (U, 3·patch²), block by block of k×k; their rows and columns, (1, 2)."""
        (rows, columns), patch, side = self.grid(*image.size), self.patch_size, self.pooling_kernel_size
        size = columns * patch, rows * patch
        pixels = np.asarray(image if image.size == size else image.resize(size, Image.Resampling.BICUBIC))
        blocks = pixels.reshape(rows // side, side, patch, columns // side, side, patch, 3)
        # (block row, row, y, block column, column, x, channel) -> (block row, block column, row, column, y, x, channel)
        ordered = np.ascontiguousarray(blocks.transpose(0, 3, 1, 4, 2, 5, 6))
        return torch.from_numpy(ordered).reshape(-1, 3 * patch**2), torch.tensor([[rows, columns]])


class Gemma4Processor(RecordProcessor):
    """Tokenizer, image and audio settings of a model folder, and the encoding of records with them.

    Args:
        system_prompt: put first where a conversation has no system turn; None and "" put none.
        long_audio: what happens to a clip longer than 30 s: "cut"; "quarantine" and "split" refuse it.

    `system_prompt`, `long_audio` and `image_places` may be set at any time.
    """

    template = GEMMA4_TEMPLATE

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        images: ImageSettings,
        feature_extractor: Gemma4AudioFeatureExtractor,
        system_prompt: str | None = None,
        long_audio: str = "quarantine",
    ):
        self.tokenizer = tokenizer
        self.images = images
        self.feature_extractor = feature_extractor
        self.system_prompt = system_prompt
        self.long_audio = long_audio
        self._read_tokenizer(tokenizer, [*IMAGE, *AUDIO])
        self._begin = [tokenizer.bos_token_id]  # the template says it, whatever the tokenizer would add

    @classmethod
    def from_pretrained(cls, folder: str | Path, **hub: Any) -> "Gemma4Processor":
        """The processor of a model folder; CheckpointError where a file is missing, or states what is not done."""
        saved = read_json(Path(folder) / "processor_config.json") or {}
        stated = saved.get("feature_extractor", {}) | saved.get("image_processor", {})
        name = "processor_config.json"
        if not stated:
            name = "preprocessor_config.json"
            stated = read_json(Path(folder) / name) or {}
        if not stated:
            raise CheckpointError(f"'{folder}' has no processor_config.json; copy it from the published model")
        vision = (read_json(Path(folder) / "config.json") or {}).get("vision_config", {})
        fixed = _FIXED | {key: vision[key] for key in ("patch_size", "pooling_kernel_size") if key in vision}
        refuse([f"'{folder}': {name}: {fault}" for fault in fixed_faults(stated, fixed)])
        sound = {key: stated[key] for key in _SOUND if stated.get(key) is not None}
        return cls(load_tokenizer(folder, **hub), ImageSettings.read(stated), Gemma4AudioFeatureExtractor(**sound))

    @property
    def image_places(self) -> int:
        """Places to which an image is scaled, or just below."""
        return self.images.max_soft_tokens

    @image_places.setter
    def image_places(self, places: int) -> None:
        self.images = replace(self.images, max_soft_tokens=places)

    def _lay_out_medium(self, tokens: Tokens, segment: Segment) -> None:
        source = segment.content
        if segment.kind == "image":
            rows, columns = self.images.grid(*image_size(file_of(source)))
            places = rows * columns // self.images.pooling_kernel_size**2
            self._add_medium(tokens, segment, (rows, columns), IMAGE, places)
        else:
            samples = self._usable_samples(self._heard_length(source, tokens.speed), f"audio {name_of(source)}")
            self._add_medium(tokens, segment, samples, AUDIO, clip_places(mel_frames(samples)))

    def _usable_samples(self, samples: int, name: str) -> int:
        """How many of a clip's samples at 16 kHz are used; BadRecord if it is too long or too short."""
        if samples > LONGEST and self.long_audio != "cut":  # this family has no windows of one recording
            raise BadRecord(
                f"{name} of {samples / SAMPLE_RATE:.1f} s is longer than {LONGEST / SAMPLE_RATE:g} s; "
                "split it, or set data.long_audio=cut"
            )
        if not mel_frames(samples):
            raise BadRecord(f"{name} of {samples} samples is too short to be heard; remove it")
        return min(samples, LONGEST)

    def _units(self, medium: Medium) -> int:
        """Patches of an image, mel frames of a clip."""
        return medium.size[0] * medium.size[1] if medium.kind == "image" else mel_frames(medium.size)

    def _seconds(self, medium: Medium) -> float | None:
        return medium.size / SAMPLE_RATE if medium.kind == "audio" else None

    @property
    def _longest_clip(self) -> int:
        return LONGEST

    def _features(self, medium: Medium, decoded: Any) -> tuple[Tensor, Tensor]:
        """Of an image uint8 (U, 3·patch²) and (1, 2); of a clip float32 (U, B) and (1,)."""
        if medium.kind == "image":
            return self.images.patches(decoded)
        features = self.feature_extractor([decoded], pad_to_multiple_of=None, return_tensors="np")["input_features"]
        return torch.from_numpy(features[0]), torch.tensor([len(features[0])])
