"""The processor of Megrez-3B-Omni: from a `Record` to its lengths, and to a `Sample`."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, BatchFeature, PreTrainedTokenizerBase, WhisperFeatureExtractor
from transformers.image_processing_utils import BaseImageProcessor
from transformers.processing_utils import ProcessorMixin
from transformers.utils import cached_file

from train.data.audio import clip_length, fit_clip, load_clip, log_mel
from train.data.chat import CHAT_TEMPLATE_JINJA, MEGREZ_TEMPLATE, TextEncoder
from train.data.images import SliceSettings, load_picture, picture_size, slices_of, to_rgb
from train.errors import BadRecord, CheckpointError
from train.geometry import SAMPLE_RATE, PictureLayout, audio_places, mel_frames
from train.schema import IGNORE_INDEX, Lengths, MediaSource, Record, Sample

TooLong = Literal["quarantine", "cut_text"]
LongAudio = Literal["quarantine", "cut"]

PLACE = "<|unk|>"
IMAGE_ENDS = ("<|image_start|>", "<|image_end|>")
SLICE_ENDS = ("<|slice_start|>", "<|slice_end|>")
IMAGE_ID_ENDS = ("<|image_id_start|>", "<|image_id_end|>")
AUDIO_ENDS = ("<|audio_start|>", "<|audio_end|>")

CLIP_TOLERANCE = (0.1, 0.01)
"""How far a clip may differ from its header: seconds, and a share of its length."""

_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


class MegrezOImageProcessor(BaseImageProcessor):
    """Cuts pictures into slices and patches; keys that it does not know are kept for saving.

    Args:
        max_slice_nums: most cells of a picture, the thumbnail not counted.
        scale_resolution: a slice has about this many pixels, squared.
        patch_size: pixels of a patch's side.
        use_image_id: number the pictures of a conversation with special tokens.
        image_feature_size: token places of a slice (the resampler's queries).
        slice_mode: False keeps every picture to one slice.
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
        """The slices of one or more Pillow pictures, flat.

        Returns:
            `patches` uint8 (P, 3·patch²), `slice_sizes` int64 (S, 2), `slices_per_picture` int64 (pictures,).
        """
        pictures = images if isinstance(images, list | tuple) else [images]
        cut = [slices_of(to_rgb(picture), self.slice_settings) for picture in pictures]
        return BatchFeature(
            {
                "patches": torch.cat([patches for patches, _ in cut]),
                "slice_sizes": torch.cat([sizes for _, sizes in cut]),
                "slices_per_picture": torch.tensor([len(sizes) for _, sizes in cut]),
            }
        )

    def to_dict(self) -> dict[str, Any]:
        """The settings as the published preprocessor_config.json has them."""
        return super().to_dict() | {"processor_class": "MegrezOProcessor"}


@dataclass(slots=True)
class _Medium:
    """A picture or clip among the tokens: the tokens [begin, end) that it fills, and its places in them."""

    source: MediaSource
    size: PictureLayout | int
    """a picture's layout, or a clip's samples at 16 kHz"""
    begin: int
    end: int
    places: np.ndarray


@dataclass(slots=True)
class _Tokens:
    """A conversation laid out as tokens, its media not yet decoded."""

    ids: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    pictures: list[_Medium] = field(default_factory=list)
    clips: list[_Medium] = field(default_factory=list)

    def extend(self, ids: list[int], weight: float = 0.0) -> None:
        self.ids += ids
        self.weights += [weight] * len(ids)

    def cut(self, limit: int) -> None:
        """Drop the tokens from `limit` on, and a medium as a whole where that falls inside it."""
        for medium in self.pictures + self.clips:
            if medium.begin < limit < medium.end:
                limit = medium.begin
        del self.ids[limit:], self.weights[limit:]
        self.pictures = [medium for medium in self.pictures if medium.end <= limit]
        self.clips = [medium for medium in self.clips if medium.end <= limit]


class MegrezOProcessor(ProcessorMixin):
    """Tokenizer, picture and audio settings of a model folder, and the encoding of records with them.

    Args:
        system_prompt: put first where a conversation has no system turn; None takes the template's, "" none.
        long_audio: what happens to a clip longer than the audio encoder takes (30 s): "quarantine" or "cut".
        audio_pool: encoder frames that become one token place (`audio_config.avg_pool`).
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
        self.system_prompt = system_prompt
        self.long_audio = long_audio
        self.audio_pool = audio_pool
        self.audio_bos_eos = audio_bos_eos
        names = [*sorted(self.template.required), PLACE, *IMAGE_ENDS, *SLICE_ENDS, *AUDIO_ENDS]
        if image_processor.use_image_id:
            names += IMAGE_ID_ENDS
        optional = [name for form in self.template.roles.values() for name in form.content_specials]
        self._encoder = TextEncoder(tokenizer.backend_tokenizer.to_str(), names, optional)

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
        pictures = _read_json(folder, "preprocessor_config.json", hub) or saved.get("image_processor")
        if not pictures:
            raise CheckpointError(f"'{folder}' has no preprocessor_config.json; copy it from the published model")
        pictures.setdefault("image_feature_size", config.get("query_num", 64))
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(folder), **hub)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"the tokenizer of '{folder}' cannot be loaded ({error})") from error

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
            settings["audio_pool"] = audio["avg_pool"]
        if "add_audio_bos_eos_token" in audio:
            settings["audio_bos_eos"] = audio["add_audio_bos_eos_token"]
        settings |= {key: kwargs[key] for key in ("system_prompt", "long_audio") if key in kwargs}
        return cls(MegrezOImageProcessor(**pictures), WhisperFeatureExtractor(**mel_settings), tokenizer, **settings)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> list[str]:  # type: ignore[override]
        """Write the processor's files, preprocessor_config.json with the published keys among them."""
        written = super().save_pretrained(str(save_directory), **kwargs)
        return written + self.image_processor.save_pretrained(str(save_directory))

    def measure(self, record: Record, *, max_tokens: int | None = None, too_long: TooLong = "quarantine") -> Lengths:
        """The lengths that `encode` will give, from headers alone; what is too long fails here already."""
        with _located(record):
            tokens = self._lay_out(record, False, max_tokens, too_long)
        patch = self.image_processor.patch_size
        return Lengths(
            tokens=len(tokens.ids),
            patches=sum(cast(PictureLayout, picture.size).patches(patch) for picture in tokens.pictures),
            frames=sum(mel_frames(cast(int, clip.size)) for clip in tokens.clips),
        )

    def encode(
        self,
        record: Record,
        *,
        generation_prompt: bool = False,
        max_tokens: int | None = None,
        too_long: TooLong = "quarantine",
    ) -> Sample:
        """The record as the model takes it, its media decoded.

        Args:
            generation_prompt: end with the beginning of an assistant's turn; such a prompt is never cut.
            max_tokens: the most tokens; None = no limit.
            too_long: refuse a longer record, or cut its end, never inside a picture or clip.

        Raises:
            BadRecord: with the record's place, if it is too long, or a medium cannot be used.
        """
        with _located(record):
            tokens = self._lay_out(record, generation_prompt, max_tokens, too_long)
            pictures = [self._slices(picture) for picture in tokens.pictures]
            mels = [self._mel(clip) for clip in tokens.clips]
        input_ids = torch.tensor(tokens.ids)
        loss_weights = torch.tensor(tokens.weights)
        no_patches = torch.empty(0, 3 * self.image_processor.patch_size**2, dtype=torch.uint8)
        no_mel = torch.empty(self.feature_extractor.feature_size, 0)
        return Sample(
            input_ids=input_ids,
            labels=input_ids.where(loss_weights > 0, IGNORE_INDEX),
            loss_weights=loss_weights,
            patches=torch.cat([patches for patches, _ in pictures] or [no_patches]),
            slice_sizes=torch.cat([sizes for _, sizes in pictures] or [torch.empty(0, 2, dtype=torch.int64)]),
            image_places=_places(tokens.pictures),
            mel=torch.cat(mels or [no_mel], dim=1),
            clip_frames=torch.tensor([mel.shape[1] for mel in mels], dtype=torch.int64),
            audio_places=_places(tokens.clips),
        )

    def prompt(self, record: Record, *, max_tokens: int | None = None) -> Sample:
        """The conversation up to its last assistant turn, ending with the generation prompt."""
        turns = record.turns[: _last_answer(record)]
        asked = Record(turns, record.file, record.line, record.type)
        return self.encode(asked, generation_prompt=True, max_tokens=max_tokens)

    def reference(self, record: Record) -> str:
        """The text of the last assistant turn: what an answer to `prompt` is compared with."""
        answer = _last_answer(record)
        return "" if answer is None else "".join(str(part.content) for part in record.turns[answer].parts)

    def text_tokens(self, text: str) -> list[int]:
        """Ids of a text, in which nothing is taken for a special token; the list is shared."""
        return self._encoder.text(text)

    def picture_id_tokens(self, number: int) -> list[int]:
        """What precedes a conversation's picture of that number, from 0; nothing where pictures are not numbered."""
        if not self.image_processor.use_image_id:
            return []
        opening, closing = map(self._encoder.special, IMAGE_ID_ENDS)
        return opening + self._encoder.text(str(number)) + closing

    def picture_tokens(self, layout: PictureLayout, number: int) -> list[int]:
        """What stands for a picture: its id, its thumbnail, and its cells row by row."""
        columns, rows = layout.grid
        queries = self.image_processor.image_feature_size
        tokens = self.picture_id_tokens(number) + self._places_between(IMAGE_ENDS, queries)
        for row in range(rows):
            tokens += self._encoder.text("\n") if row else []
            tokens += self._places_between(SLICE_ENDS, queries) * columns
        return tokens

    def clip_tokens(self, samples: int) -> list[int]:
        """What stands for a clip of so many samples at 16 kHz."""
        return self._places_between(AUDIO_ENDS, self._clip_places(samples))

    def heard_samples(self, samples: int, name: str) -> int:
        """How many of a clip's samples at 16 kHz are heard; BadRecord if it is too long or too short."""
        most = self.feature_extractor.n_samples
        if samples > most:
            if self.long_audio == "quarantine":
                raise BadRecord(
                    f"{name} of {samples / SAMPLE_RATE:.1f} s is longer than "
                    f"{most / SAMPLE_RATE:g} s; split it, or set long_audio=cut"
                )
            samples = most
        if not self._clip_places(samples):
            raise BadRecord(f"{name} of {samples} samples is too short to be heard; remove it")
        return samples

    def _clip_places(self, samples: int) -> int:
        return audio_places(samples, pool=self.audio_pool, bos_eos=self.audio_bos_eos)

    def _lay_out(self, record: Record, generation_prompt: bool, max_tokens: int | None, too_long: TooLong) -> _Tokens:
        tokens = _Tokens()
        for segment in self.template.render(
            record.turns, system_prompt=self.system_prompt, generation_prompt=generation_prompt
        ):
            if segment.kind == "text":
                tokens.extend(self._encoder.text(str(segment.content)), segment.weight)
            elif segment.kind == "special":
                tokens.extend(self._encoder.special(str(segment.content)), segment.weight)
            elif segment.kind == "image":
                self._lay_out_picture(tokens, segment.content)
            else:
                self._lay_out_clip(tokens, segment.content)
        length = len(tokens.ids)
        if max_tokens is None or length <= max_tokens:
            return tokens
        if too_long == "quarantine" or generation_prompt:
            raise BadRecord(
                f"it has {length} tokens, more than {max_tokens}; shorten it, raise data.max_tokens, "
                "or set data.too_long=cut_text"
            )
        tokens.cut(max_tokens)
        if not any(tokens.weights):
            raise BadRecord(f"of its {length} tokens the first {max_tokens} hold nothing that is learned; shorten it")
        return tokens

    def _lay_out_picture(self, tokens: _Tokens, source: MediaSource) -> None:
        layout = self.image_processor.slice_settings.layout(*picture_size(source))
        ids = self.picture_tokens(layout, len(tokens.pictures))
        tokens.pictures.append(self._lay_out_medium(tokens, source, layout, ids))

    def _lay_out_clip(self, tokens: _Tokens, source: MediaSource) -> None:
        samples = self.heard_samples(clip_length(source), f"audio {_name(source)}")
        tokens.clips.append(self._lay_out_medium(tokens, source, samples, self.clip_tokens(samples)))

    def _lay_out_medium(
        self, tokens: _Tokens, source: MediaSource, size: PictureLayout | int, ids: list[int]
    ) -> _Medium:
        """Add the tokens of a picture or clip."""
        begin = len(tokens.ids)
        tokens.extend(ids)
        places = begin + np.flatnonzero(np.array(ids) == self._encoder.special(PLACE)[0])
        return _Medium(source, size, begin, len(tokens.ids), places)

    def _places_between(self, ends: tuple[str, str], count: int) -> list[int]:
        special = self._encoder.special
        return special(ends[0]) + special(PLACE) * count + special(ends[1])

    def _slices(self, picture: _Medium) -> tuple[Tensor, Tensor]:
        return slices_of(load_picture(picture.source), self.image_processor.slice_settings)

    def _mel(self, clip: _Medium) -> Tensor:
        samples = cast(int, clip.size)
        decoded = load_clip(clip.source, samples)
        if samples == self.feature_extractor.n_samples:  # the longest there is: what follows was cut
            decoded = decoded[:samples]
        seconds, share = CLIP_TOLERANCE
        try:
            fitted = fit_clip(decoded, samples, seconds + share * samples / SAMPLE_RATE)
        except BadRecord as fault:
            raise BadRecord(f"{_name(clip.source)}: {fault}") from None
        return log_mel(fitted, self.feature_extractor)


def _places(media: list[_Medium]) -> Tensor:
    return torch.from_numpy(np.concatenate([np.empty(0, np.int64), *(medium.places for medium in media)]))


def _name(source: MediaSource) -> str:
    return f"'{source}'" if isinstance(source, str) else "(embedded)"


def _last_answer(record: Record) -> int | None:
    answers = [index for index, turn in enumerate(record.turns) if turn.role == "assistant"]
    return answers[-1] if answers else None


@contextmanager
def _located(record: Record) -> Iterator[None]:
    """Put the record's place before the reason of a BadRecord."""
    try:
        yield
    except BadRecord as fault:
        raise BadRecord(f"{record.file}:{record.line}: {fault}") from None


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
