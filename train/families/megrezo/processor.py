"""The processor of Megrez-3B-Omni: images, recordings and text."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from transformers import BatchFeature, PreTrainedTokenizerBase, WhisperFeatureExtractor
from transformers.image_processing_utils import BaseImageProcessor
from transformers.processing_utils import ProcessorMixin
from transformers.utils import cached_file

from train.data.audio import SAMPLE_RATE, log_mel, name_of
from train.data.chat_template import Segment
from train.data.encoding import Medium, RecordProcessor, Tokens, load_tokenizer
from train.data.images import image_size, to_rgb
from train.data.windows import window_cuts
from train.errors import BadRecord, CheckpointError
from train.families.megrezo.geometry import HOP, ImageLayout, audio_places, mel_frames, pool_factor
from train.families.megrezo.slices import SliceSettings, slices_of
from train.families.megrezo.template import CHAT_TEMPLATE_JINJA, MEGREZ_TEMPLATE
from train.model_settings import count_faults, fixed_faults, kind_faults, refuse
from train.schema import Changes, Part, Slice, Turn, Window, file_of

LongAudio = Literal["quarantine", "cut", "split"]

_MAX_SPLIT_S = 3600
"""Longest recording that is split: by far more than the model's positions take."""

PLACE = "<|unk|>"
IMAGE_ENDS = ("<|image_start|>", "<|image_end|>")
SLICE_ENDS = ("<|slice_start|>", "<|slice_end|>")
IMAGE_ID_ENDS = ("<|image_id_start|>", "<|image_id_end|>")
AUDIO_ENDS = ("<|audio_start|>", "<|audio_end|>")

_FIXED = {"norm_mean": [0.5] * 3, "norm_std": [0.5] * 3, "sampling_rate": SAMPLE_RATE, "hop_length": HOP, "n_fft": 400}
"""The only values of these keys in preprocessor_config.json: the model norms pixels itself, mels are Whisper's."""

_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


class MegrezOImageProcessor(BaseImageProcessor):
    """Cuts images into slices and patches; keys that it does not know are kept for saving.

    Args:
        max_slice_nums: most cells of an image, the thumbnail not counted.
        scale_resolution: a slice has about this many pixels, squared.
        patch_size: pixels of a patch's side.
        use_image_id: number the images of a conversation with special tokens.
        image_feature_size: token places of a slice (the resampler's queries).
        slice_mode: False keeps every image to one slice.

    CheckpointError names each value that is not implemented.
    """

    model_input_names = ["patches", "slice_sizes"]  # noqa: RUF012

    def __init__(
        self,
        max_slice_nums: int = 9,
        scale_resolution: int = 448,
        patch_size: int = 14,
        use_image_id: bool = True,
        image_feature_size: int = 64,
        slice_mode: bool = True,
        **kwargs: Any,
    ):
        sizes = {"max_slice_nums": max_slice_nums, "scale_resolution": scale_resolution}
        sizes |= {"patch_size": patch_size, "image_feature_size": image_feature_size}
        faults = count_faults(sizes, tuple(sizes))
        switches = {"use_image_id": use_image_id, "slice_mode": slice_mode}
        faults += kind_faults(switches, bool, **dict.fromkeys(switches, "true or false"))
        refuse([f"preprocessor_config.json: {fault}" for fault in faults + fixed_faults(kwargs, _FIXED)])
        super().__init__(**kwargs)
        self.max_slice_nums = max_slice_nums
        self.scale_resolution = scale_resolution
        self.patch_size = patch_size
        self.use_image_id = use_image_id
        self.image_feature_size = image_feature_size
        self.slice_mode = slice_mode

    @property
    def slice_settings(self) -> SliceSettings:
        """The settings in the form that `images` takes."""
        max_slices = self.max_slice_nums if self.slice_mode else 1
        return SliceSettings(max_slices, self.scale_resolution, self.patch_size)

    def preprocess(self, images: Any, **_: Any) -> BatchFeature:
        """The slices of one or more Pillow images, flat.

        Returns:
            `patches` uint8 (P, 3·patch²), `slice_sizes` int64 (S, 2), `slices_per_image` int64 (images,).
        """
        several = images if isinstance(images, list | tuple) else [images]
        cut = [slices_of(to_rgb(image), self.slice_settings) for image in several]
        return BatchFeature(
            {
                "patches": torch.cat([patches for patches, _ in cut]),
                "slice_sizes": torch.cat([sizes for _, sizes in cut]),
                "slices_per_image": torch.tensor([len(sizes) for _, sizes in cut]),
            }
        )

    def to_dict(self) -> dict[str, Any]:
        """The settings as the published preprocessor_config.json has them."""
        return super().to_dict() | {"processor_class": "MegrezOProcessor"}


class MegrezOProcessor(RecordProcessor, ProcessorMixin):
    """Tokenizer, image and audio settings of a model folder, and the encoding of records with them.

    Args:
        system_prompt: put first where a conversation has no system turn; None takes the template's, "" none.
        long_audio: what happens to a clip longer than the audio encoder takes (30 s): "quarantine", "cut" (the rest is
            dropped), or "split" into windows, each of which is heard like a clip of its own.
        audio_pool: encoder frames that become one token place (see `geometry.pool_factor`).
        audio_bos_eos: whether begin and end embeddings take two more places.

    `system_prompt` and `long_audio` may be set at any time.
    """

    template = MEGREZ_TEMPLATE

    def __init__(
        self,
        image_processor: MegrezOImageProcessor,
        feature_extractor: WhisperFeatureExtractor,
        tokenizer: PreTrainedTokenizerBase,
        system_prompt: str | None = None,
        long_audio: LongAudio = "quarantine",
        audio_pool: int = 2,
        audio_bos_eos: bool = True,
        chat_template: str | None = None,
    ):
        chat_template = chat_template or getattr(tokenizer, "chat_template", None) or CHAT_TEMPLATE_JINJA
        super().__init__(image_processor, feature_extractor, tokenizer, chat_template=chat_template)
        if long_audio not in get_args(LongAudio):
            raise ValueError(f"long_audio is {long_audio!r}; it must be one of {', '.join(get_args(LongAudio))}")
        self.system_prompt = system_prompt
        self.long_audio = long_audio
        self.audio_pool = audio_pool
        self.audio_bos_eos = audio_bos_eos
        image_id_ends = IMAGE_ID_ENDS if image_processor.use_image_id else ()
        self._read_tokenizer(tokenizer, [PLACE, *IMAGE_ENDS, *SLICE_ENDS, *AUDIO_ENDS, *image_id_ends])

    @classmethod
    def from_pretrained(cls, folder: str | Path, **kwargs: Any) -> "MegrezOProcessor":  # type: ignore[override]
        """The processor of a model folder (or Hub name), with the settings that its files state.

        Args:
            kwargs: `system_prompt` or `long_audio` instead of what was saved; options of the Hub.

        Raises:
            CheckpointError: if a file is missing or broken, or the tokenizer lacks a special token.
        """
        hub = {key: kwargs[key] for key in _HUB_OPTIONS if key in kwargs}
        config = _read_json(folder, "config.json", hub)
        saved = _read_json(folder, "processor_config.json", hub)
        images = _read_json(folder, "preprocessor_config.json", hub) or saved.get("image_processor")
        if not images:
            raise CheckpointError(f"'{folder}' has no preprocessor_config.json; copy it from the published model")
        model = {"image_feature_size": config.get("query_num"), "patch_size": config.get("patch_size")}
        _check_settings_match(folder, images, model)
        images.setdefault("image_feature_size", config.get("query_num", 64))
        tokenizer = load_tokenizer(folder, **hub)
        audio = config.get("audio_config", {})
        mel_settings = saved.get("feature_extractor", {"feature_size": 128})
        if "n_mels" in audio:
            mel_settings["feature_size"] = audio["n_mels"]
        if "n_ctx" in audio:  # encoder frames of 20 ms
            mel_settings["chunk_length"] = audio["n_ctx"] // 50
        settings = {
            key: saved[key] for key in ("system_prompt", "long_audio", "audio_pool", "audio_bos_eos") if key in saved
        }
        if "avg_pool" in audio:
            settings["audio_pool"] = pool_factor(audio["avg_pool"])
        if "add_audio_bos_eos_token" in audio:
            settings["audio_bos_eos"] = audio["add_audio_bos_eos_token"]
        settings |= {key: kwargs[key] for key in ("system_prompt", "long_audio") if key in kwargs}
        return cls(MegrezOImageProcessor(**images), WhisperFeatureExtractor(**mel_settings), tokenizer, **settings)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> list[str]:  # type: ignore[override]
        """Write the processor's files, preprocessor_config.json with the published keys among them."""
        written = super().save_pretrained(str(save_directory), **kwargs)
        return written + self.image_processor.save_pretrained(str(save_directory))

    def text_tokens(self, text: str) -> list[int]:
        """Ids of a text, in which nothing is taken for a special token; the list is shared."""
        return self._encoder.text(text)

    def image_id_tokens(self, number: int) -> list[int]:
        """What precedes a conversation's image of that number, from 0; nothing where images are not numbered."""
        if not self.image_processor.use_image_id:
            return []
        opening, closing = map(self._encoder.special, IMAGE_ID_ENDS)
        return opening + self._encoder.text(str(number)) + closing

    def image_tokens(self, layout: ImageLayout, number: int) -> list[int]:
        """What stands for an image: its id, its thumbnail, and its cells row by row."""
        columns, rows = layout.grid
        queries = self.image_processor.image_feature_size
        tokens = self.image_id_tokens(number) + self._places_between(IMAGE_ENDS, queries)
        for row in range(rows):
            tokens += self._encoder.text("\n") if row else []
            tokens += self._places_between(SLICE_ENDS, queries) * columns
        return tokens

    def clip_tokens(self, samples: int) -> list[int]:
        """What stands for a clip, or a window, of so many samples at 16 kHz."""
        return self._places_between(AUDIO_ENDS, self._clip_places(samples))

    def joined_windows(self, windows: Sequence[list[int]], number: int) -> list[int]:
        """What stands for the windows of a recording, as clips from `number` on; windows: tokens of each."""
        ids = list(windows[0])
        for index, window in enumerate(windows[1:], number + 1):
            between = self.template.media_suffix + self.template.audio_prefix.format(number=index)
            ids += self._encoder.text(between) + window
        return ids

    def window_cuts(self, samples: int, clip: np.ndarray | None = None) -> list[int]:
        """Where a recording's windows begin and end, as `data.windows` has them: one window where it is not split."""
        most = self.feature_extractor.n_samples
        if self.long_audio != "split" or samples <= most:
            return [0, samples]
        frame = 2 * HOP * self.audio_pool
        return window_cuts(samples, most - most % frame, frame, clip)

    def usable_samples(self, samples: int, name: str) -> int:
        """How many of a clip's samples at 16 kHz are used; BadRecord if it is too long or too short."""
        most = self.feature_extractor.n_samples
        if samples > most:
            if self.long_audio == "quarantine":
                raise BadRecord(
                    f"{name} of {samples / SAMPLE_RATE:.1f} s is longer than "
                    f"{most / SAMPLE_RATE:g} s; set data.long_audio=split, or cut"
                )
            if self.long_audio == "split" and samples > _MAX_SPLIT_S * SAMPLE_RATE:
                raise BadRecord(f"{name} of {samples / SAMPLE_RATE:.0f} s is longer than {_MAX_SPLIT_S} s; split it")
            samples = most if self.long_audio == "cut" else samples
        if not self._clip_places(samples):
            raise BadRecord(f"{name} of {samples} samples is too short to be heard; remove it")
        return samples

    def _split(self, turns: tuple[Turn, ...], speed: float, decode: bool, changes: Changes | None) -> tuple[Turn, ...]:
        if self.long_audio != "split":
            return turns

        def in_windows(turn: Turn) -> Turn:
            pieces = [piece for part in turn.parts for piece in self._in_windows(part, speed, decode, changes)]
            return replace(turn, parts=tuple(pieces))

        return tuple(map(in_windows, turns))

    def _in_windows(self, part: Part, speed: float, decode: bool, changes: Changes | None) -> Iterable[Part]:
        """A part of a turn, or the windows of a recording that is split."""
        if part.kind != "audio":
            return (part,)
        source, total = part.content, self._heard_length(part.content, speed)
        if isinstance(source, Window) or total <= self.feature_extractor.n_samples:
            return (part,)
        self.usable_samples(total, f"audio {name_of(source)}")
        clip = self._heard(source, total, changes) if decode else None
        return [
            Part("audio", Window(source, begin, end, total, None if clip is None else clip[begin:end]))
            for begin, end in pairwise(self.window_cuts(total, clip))
        ]

    def _lay_out_medium(self, tokens: Tokens, segment: Segment) -> None:
        source, begin = segment.content, len(tokens.ids)
        if segment.kind == "image":
            layout = self.image_processor.slice_settings.layout(*image_size(file_of(source)))
            places = self._extend(tokens, self.image_tokens(layout, len(tokens.of("image"))))
            tokens.media.append(Medium("image", source, layout, begin, len(tokens.ids), places))
        else:
            samples = self.usable_samples(self._heard_length(source, tokens.speed), f"audio {name_of(source)}")
            places = self._extend(tokens, self.clip_tokens(samples))
            tokens.media.append(Medium("audio", source, samples, begin, len(tokens.ids), places))

    def _extend(self, tokens: Tokens, ids: list[int]) -> np.ndarray:
        """Add a medium's tokens; the indices of its places."""
        tokens.extend(ids)
        begin = len(tokens.ids) - len(ids)
        return begin + np.flatnonzero(np.array(ids) == self._encoder.special(PLACE)[0])

    def _places_between(self, ends: tuple[str, str], count: int) -> list[int]:
        special = self._encoder.special
        return special(ends[0]) + special(PLACE) * count + special(ends[1])

    def _clip_places(self, samples: int) -> int:
        return audio_places(samples, pool=self.audio_pool, bos_eos=self.audio_bos_eos)

    def _units(self, medium: Medium) -> int:
        """Patches of an image, mel frames of a clip."""
        if medium.kind == "image":
            return medium.size.patches(self.image_processor.patch_size)
        return mel_frames(medium.size)

    def _slices(self, medium: Medium) -> tuple[Slice, ...]:
        """The thumbnail, then the cells row by row."""
        if medium.kind != "image":
            return ()
        layout = medium.size
        columns, rows = layout.grid
        cells = [
            Slice((column / columns, row / rows, (column + 1) / columns, (row + 1) / rows), layout.cell)
            for row in range(rows)
            for column in range(columns)
        ]
        return (Slice((0.0, 0.0, 1.0, 1.0), layout.thumbnail), *cells)

    def _seconds(self, medium: Medium) -> float | None:
        return medium.size / SAMPLE_RATE if medium.kind == "audio" else None

    @property
    def _longest_clip(self) -> int:
        return self.feature_extractor.n_samples

    def _features(self, medium: Medium, decoded: Any) -> tuple[Tensor, Tensor]:
        """Of an image uint8 (P, 3·patch²) and (S, 2); of a clip float32 (F, B) and (1,)."""
        if medium.kind == "image":
            return slices_of(decoded, self.image_processor.slice_settings)
        mel = log_mel(decoded, self.feature_extractor, mel_frames(medium.size))
        return mel, torch.tensor([len(mel)])


def _check_settings_match(folder: str | Path, images: dict[str, Any], model: dict[str, Any]) -> None:
    """CheckpointError where preprocessor_config.json and config.json do not agree."""
    stated = {key: value for key, value in model.items() if value is not None}
    refuse(
        [
            f"'{folder}': {fault}, by config.json; correct preprocessor_config.json"
            for fault in fixed_faults(images, stated)
        ]
    )


def _read_json(folder: str | Path, name: str, hub: dict[str, Any]) -> dict[str, Any]:
    """A JSON file of a model folder; empty if there is none."""
    try:
        path = cached_file(str(folder), name, _raise_exceptions_for_missing_entries=False, **hub)
    except OSError as error:
        raise CheckpointError(f"'{folder}' is not a model folder ({error}); correct its path") from None
    if path is None:
        return {}
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"'{path}' is not valid JSON ({error}); copy it again") from None
