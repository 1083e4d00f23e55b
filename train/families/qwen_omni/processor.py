"""The processor of Qwen2.5-Omni: images, recordings and text."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase, WhisperFeatureExtractor
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from train.data.audio import SAMPLE_RATE, log_mel, name_of
from train.data.chat_template import Segment
from train.data.encoding import Medium, RecordProcessor, Tokens, load_tokenizer
from train.data.images import image_size
from train.errors import BadRecord, CheckpointError
from train.families.family import read_json
from train.families.qwen_omni.geometry import HOP, clip_places, image_pixels, mel_frames, positions
from train.families.qwen_omni.template import QWEN_OMNI_TEMPLATE
from train.model_settings import count_faults, fixed_faults, refuse
from train.schema import file_of

IMAGE = ("<|vision_bos|>", "<|IMAGE|>", "<|vision_eos|>")
AUDIO = ("<|audio_bos|>", "<|AUDIO|>", "<|audio_eos|>")

_FIXED = {
    "image_mean": list(OPENAI_CLIP_MEAN),
    "image_std": list(OPENAI_CLIP_STD),
    "temporal_patch_size": 2,
    "resample": 3,
    "rescale_factor": 1 / 255,
    **dict.fromkeys(("do_resize", "do_rescale", "do_normalize"), True),
    "sampling_rate": SAMPLE_RATE,
    "hop_length": HOP,
    "n_fft": 400,
    "padding_value": 0.0,
    "dither": 0.0,
}
"""The only values of these keys in preprocessor_config.json: the model norms pixels itself, mels are Whisper's."""

_HOURS = 24
"""Longest clip that is heard; the model's context is over long before."""


@dataclass(frozen=True)
class ImageSettings:
    """How images are scaled and cut: patches of `patch_size`² pixels, `merge_size`² of which make one place."""

    patch_size: int = 14
    merge_size: int = 2
    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 1280

    @classmethod
    def read(cls, stated: dict[str, Any]) -> "ImageSettings":
        """Of preprocessor_config.json, which newer versions of transformers write with `size`."""
        size = stated.get("size") or {}
        renamed = {"min_pixels": size.get("shortest_edge"), "max_pixels": size.get("longest_edge")}
        found = {name: value for name, value in renamed.items() if value is not None}
        found |= {item.name: stated[item.name] for item in fields(cls) if stated.get(item.name) is not None}
        refuse([f"preprocessor_config.json: {fault}" for fault in count_faults(found, tuple(found))])
        return cls(**found)

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """Rows and columns of patches of an image; BadRecord where it is too long and narrow."""
        multiple = self.patch_size * self.merge_size
        try:
            scaled = image_pixels(width, height, multiple=multiple, least=self.min_pixels, most=self.max_pixels)
        except ValueError as fault:
            raise BadRecord(f"image: {fault}; cut it into several") from None
        return scaled[1] // self.patch_size, scaled[0] // self.patch_size

    def patches(self, image: Image.Image) -> tuple[Tensor, Tensor]:
        """The image's patches, uint8 (U, 3·patch²), in blocks of merge×merge; their rows and columns, (1, 2)."""
        (rows, columns), patch, merge = self.grid(*image.size), self.patch_size, self.merge_size
        pixels = np.asarray(image.resize((columns * patch, rows * patch), Image.Resampling.BICUBIC))
        blocks = pixels.reshape(rows // merge, merge, patch, columns // merge, merge, patch, 3)
        # (block row, row, y, block column, column, x, channel) -> (block row, block column, row, column, channel, y, x)
        ordered = np.ascontiguousarray(blocks.transpose(0, 3, 1, 4, 6, 2, 5))
        return torch.from_numpy(ordered).reshape(-1, 3 * patch**2), torch.tensor([[rows, columns]])


class QwenOmniProcessor(RecordProcessor):
    """Tokenizer, image and audio settings of a model folder, and the encoding of records with them.

    Args:
        mel_bins: of the model's audio tower.
        system_prompt: put first where a conversation has no system turn; None takes the template's, "" none.
    """

    template = QWEN_OMNI_TEMPLATE
    long_audio = "quarantine"
    """Read nowhere: no clip is too long for the towers, and `data.max_tokens` bounds a record."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        images: ImageSettings,
        mel_bins: int = 128,
        system_prompt: str | None = None,
    ):
        self.tokenizer = tokenizer
        self.images = images
        # Its longest clip only bounds what it pads and cuts to; frames do not depend on it.
        self.feature_extractor = WhisperFeatureExtractor(feature_size=mel_bins, chunk_length=_HOURS * 3600)
        self.system_prompt = system_prompt
        self._read_tokenizer(tokenizer, [*IMAGE, *AUDIO])

    @classmethod
    def from_pretrained(cls, folder: str | Path, **hub: Any) -> "QwenOmniProcessor":
        """The processor of a model folder; CheckpointError where a file is missing, or states what is not done."""
        saved = read_json(Path(folder) / "processor_config.json") or {}
        stated = read_json(Path(folder) / "preprocessor_config.json") or {
            **saved.get("feature_extractor", {}),
            **saved.get("image_processor", {}),
        }
        if not stated:
            raise CheckpointError(f"'{folder}' has no preprocessor_config.json; copy it from the published model")
        thinker = (read_json(Path(folder) / "config.json") or {}).get("thinker_config", {})
        vision, mel_bins = thinker.get("vision_config", {}), thinker.get("audio_config", {}).get("num_mel_bins", 128)
        of_model = {"patch_size": "patch_size", "merge_size": "spatial_merge_size"}
        fixed = _FIXED | {"feature_size": mel_bins}
        fixed |= {name: vision[key] for name, key in of_model.items() if key in vision}
        refuse([f"'{folder}': preprocessor_config.json: {fault}" for fault in fixed_faults(stated, fixed)])
        return cls(load_tokenizer(folder, **hub), ImageSettings.read(stated), mel_bins)

    def _lay_out_medium(self, tokens: Tokens, segment: Segment) -> None:
        source = segment.content
        if segment.kind == "image":
            rows, columns = self.images.grid(*image_size(file_of(source)))
            places = rows * columns // self.images.merge_size**2
            self._add_medium(tokens, segment, (rows, columns), IMAGE, places)
        else:
            samples = self._heard_length(source, tokens.speed)
            places = clip_places(mel_frames(samples))
            if not places:
                raise BadRecord(f"audio {name_of(source)} of {samples} samples is too short to be heard; remove it")
            self._add_medium(tokens, segment, samples, AUDIO, places)

    def _units(self, medium: Medium) -> int:
        """Patches of an image, mel frames of a clip."""
        return medium.size[0] * medium.size[1] if medium.kind == "image" else mel_frames(medium.size)

    def _features(self, medium: Medium, decoded: Any) -> tuple[Tensor, Tensor]:
        """Of an image uint8 (U, 3·patch²) and (1, 2); of a clip float32 (U, B) and (1,)."""
        if medium.kind == "image":
            return self.images.patches(decoded)
        mel = log_mel(decoded, self.feature_extractor, mel_frames(medium.size))
        return mel, torch.tensor([len(mel)])

    def _positions(self, tokens: Tokens) -> Tensor:
        """int64 (3, T): time, row and column."""
        merge = self.images.merge_size
        held = [(int(medium.places[0]), *(side // merge for side in medium.size)) for medium in tokens.of("image")]
        return positions(len(tokens.ids), held)
