"""What vLLM asks about images and recordings, answered by the model folder's own processor.

vLLM tokenises the rendered chat, in which `PLACEHOLDERS` stand for media, and decodes the media. Here the tokens become
those that training saw, and the media become patches and log-mel frames.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, groupby, pairwise
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature
from vllm.multimodal.image import normalize_image
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.media import MediaWithBytes
from vllm.multimodal.parse import AudioProcessorItems, ImageProcessorItems, MultiModalDataItems, MultiModalDataParser
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptReplacement,
    PromptUpdate,
    PromptUpdateDetails,
)
from vllm.multimodal.processing.processor import ResolvedPromptUpdate

from train.data.audio import SAMPLE_RATE, clip_samples, fit_clip, log_mel, resampled
from train.data.images import load_image, to_rgb
from train.families.megrezo.geometry import HOP, mel_frames
from train.families.megrezo.processor import AUDIO_ENDS, IMAGE_ENDS, PLACE, MegrezOProcessor
from train.inference.vllm_plugin import media_io  # noqa: F401  its connector takes effect by being imported
from train.inference.vllm_plugin.options import refuse_options

PLACEHOLDERS = {"image": "(<image>./</image>)", "audio": "(<audio>./</audio>)"}
"""What the chat template writes for a medium."""

_ENDS = {"image": IMAGE_ENDS, "audio": AUDIO_ENDS}
_PLACEHOLDER = re.compile("|".join(f"(?P<{kind}>{re.escape(text)})" for kind, text in PLACEHOLDERS.items()))


class MediaParser(MultiModalDataParser):
    """Images and clips of requests, as `data.images` and `data.audio` read them."""

    def __init__(self, processor: MegrezOProcessor, **options: Any):
        super().__init__(**options)
        self._processor = processor

    def _parse_image_data(self, data: Any) -> Any:
        images = [data] if isinstance(data, Image.Image | MediaWithBytes | np.ndarray) else data
        return super()._parse_image_data([_image(item) for item in images] if isinstance(images, list) else data)

    def _get_audio_with_sr(self, audio: Any) -> tuple[np.ndarray, None]:
        """The clip at 16 kHz, and no rate, so that vLLM does not resample it."""
        decoded, rate = super()._get_audio_with_sr(audio)
        decoded = np.asarray(decoded, np.float32)
        mono = decoded.mean(axis=0) if decoded.ndim == 2 else decoded
        rate = SAMPLE_RATE if rate is None else rate
        samples = self._processor.usable_samples(clip_samples(len(mono) / rate), "audio")
        # A resampler's rounding is all that the clip can differ by.
        return fit_clip(resampled(mono, rate)[:samples], samples, tolerance=0.01), None


def _windows(processor: MegrezOProcessor, clip: np.ndarray) -> list[np.ndarray]:
    """The windows of a clip at 16 kHz, itself alone where it is not split."""
    return [clip[begin:end] for begin, end in pairwise(processor.window_cuts(len(clip), clip))]


def _image(item: Any) -> Any:
    """An image as training would see it; vLLM lays transparency on white, and reduces 16 bits, in ways of its own."""
    if isinstance(item, MediaWithBytes):
        is_converted = item.io_config is not None
        return replace(item, media=load_image(item.original_bytes)) if is_converted else item
    if isinstance(item, np.ndarray):  # (height, width, 3)
        item = Image.fromarray(item)
    return to_rgb(normalize_image(item)) if isinstance(item, Image.Image) else item


class ProcessingInfo(BaseProcessingInfo):
    """What vLLM has to know of the processor. The server's `--mm-processor-kwargs` set its options."""

    def get_hf_processor(self, **kwargs: Any) -> MegrezOProcessor:
        """The model folder's processor; ValueError for options, which only a request can state here."""
        refuse_options(kwargs)
        return self.ctx.get_hf_processor(MegrezOProcessor)

    def get_data_parser(self) -> MediaParser:
        """The parser of requests' media."""
        return MediaParser(self.get_hf_processor(), expected_hidden_size=self._get_expected_hidden_size())

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        """As many images and clips as the context takes."""
        return dict.fromkeys(PLACEHOLDERS)


class DummyInputs(BaseDummyInputsBuilder[ProcessingInfo]):
    """The largest media, by which vLLM reserves memory."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        """Placeholders of so many media."""
        return "".join(PLACEHOLDERS[kind] * count for kind, count in mm_counts.items())

    def get_dummy_mm_data(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Mapping[str, Any]) -> Any:
        """Images of one column of most slices, each on a line of its own, and clips of full length."""
        processor = self.info.get_hf_processor()
        settings = processor.image_processor.slice_settings
        return {
            "image": self._get_dummy_images(
                width=settings.scale,
                height=settings.scale * settings.max_slices,
                num_images=mm_counts.get("image", 0),
                overrides=mm_options.get("image"),
            ),
            "audio": self._get_dummy_audios(
                length=_longest_clip(processor, seq_len),
                num_audios=mm_counts.get("audio", 0),
                overrides=mm_options.get("audio"),
            ),
        }


def _longest_clip(processor: MegrezOProcessor, tokens: int) -> int:
    """Samples of the longest recording that so many tokens take."""
    most = processor.feature_extractor.n_samples
    if processor.long_audio != "split":
        return most
    # Windows have up to twenty tokens beside their places, of which they have 600 and more.
    return max(most, tokens * 19 // 20 * 2 * HOP * processor.audio_pool)


class MediaProcessor(BaseMultiModalProcessor[ProcessingInfo]):
    """From media to the model's inputs, and from placeholders to tokens.

    One image is one item with all its slices, one recording with all its windows. Their fields are those of
    `schema.Batch`, items end to end: `patches` uint8 (P, 3·patch²), `slice_sizes` int64 (S, 2), `slices_per_image`;
    `mel` float (F, B), `clip_frames` of each window, `windows_per_clip`.
    """

    def _call_hf_processor(self, hf_data: Mapping[str, Any], hf_kwargs: Mapping[str, Any]) -> BatchFeature:
        processor = self.info.get_hf_processor(**hf_kwargs)
        fields = BatchFeature()
        if "images" in hf_data:
            fields.update(processor.image_processor.preprocess(hf_data["images"]))
        if "audio" in hf_data:
            windows = [_windows(processor, clip) for clip in hf_data["audio"]]
            mels = [
                log_mel(window, processor.feature_extractor, mel_frames(len(window)))
                for clip in windows
                for window in clip
            ]
            fields["mel"] = torch.cat(mels)
            fields["clip_frames"] = torch.tensor([len(mel) for mel in mels])
            fields["windows_per_clip"] = torch.tensor([len(clip) for clip in windows])
        return fields

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, Any]
    ) -> Mapping[str, MultiModalFieldConfig]:
        field = MultiModalFieldConfig
        config = {}
        if "patches" in hf_inputs:
            slices = hf_inputs["slices_per_image"]
            patches = hf_inputs["slice_sizes"].prod(dim=1)
            patches = torch.stack([image.sum() for image in patches.split(slices.tolist())])
            config["patches"] = field.flat_from_sizes("image", patches)
            config["slice_sizes"] = field.flat_from_sizes("image", slices, keep_on_cpu=True)
            config["slices_per_image"] = field.batched("image", keep_on_cpu=True)
        if "mel" in hf_inputs:
            windows = hf_inputs["windows_per_clip"]
            frames = torch.stack([clip.sum() for clip in hf_inputs["clip_frames"].split(windows.tolist())])
            config["mel"] = field.flat_from_sizes("audio", frames)
            config["clip_frames"] = field.flat_from_sizes("audio", windows, keep_on_cpu=True)
            config["windows_per_clip"] = field.batched("audio", keep_on_cpu=True)
        return config

    def _postprocess_prompt(self, prompt: list[int]) -> list[int]:
        """The prompt with a medium's two end tokens, nothing between them, in place of each placeholder.

        The text around a placeholder is tokenised anew, since it may share tokens with it.
        """
        tokenizer = self.info.get_tokenizer()
        added = set(tokenizer.get_added_vocab().values())
        marked: list[int] = []
        for is_special, run in groupby(prompt, key=added.__contains__):
            ids = list(run)
            text = "" if is_special else tokenizer.decode(ids)
            marked += self._marked(text) if _PLACEHOLDER.search(text) else ids
        return marked

    def _marked(self, text: str) -> list[int]:
        processor = self.info.get_hf_processor()
        ids: list[int] = []
        begin = 0
        for found in _PLACEHOLDER.finditer(text):
            ids += processor.text_tokens(text[begin : found.start()])
            ids += processor.tokenizer.convert_tokens_to_ids(list(_ENDS[str(found.lastgroup)]))
            begin = found.end()
        return ids + processor.text_tokens(text[begin:])

    def _get_prompt_updates(
        self, mm_items: MultiModalDataItems, hf_processor_mm_kwargs: Mapping[str, Any], out_mm_kwargs: Any
    ) -> Sequence[PromptUpdate]:
        processor = self.info.get_hf_processor(**hf_processor_mm_kwargs)
        settings = processor.image_processor.slice_settings

        def image(index: int) -> PromptUpdateDetails:
            layout = settings.layout(*mm_items.get_items("image", ImageProcessorItems).get_image_size(index))
            return self._details(processor.image_tokens(layout, index))

        def clip(index: int) -> PromptUpdateDetails:
            windows = _windows(processor, mm_items.get_items("audio", AudioProcessorItems).get(index))
            tokens = [processor.clip_tokens(len(window)) for window in windows]
            return self._details(processor.joined_windows(tokens, index + 1))

        return [
            PromptReplacement(kind, processor.tokenizer.convert_tokens_to_ids(list(_ENDS[kind])), replacement)
            for kind, replacement in (("image", image), ("audio", clip))
        ]

    def _recompute_cached_prompt_update(
        self, cached_update: ResolvedPromptUpdate, new_item_idx: int
    ) -> ResolvedPromptUpdate:
        """An image's tokens, kept from another conversation, with its number in this one."""
        update = super()._recompute_cached_prompt_update(cached_update, new_item_idx)
        if update.modality != "image":
            return update
        processor = self.info.get_hf_processor()
        unnumbered = update.content.full[len(processor.image_id_tokens(cached_update.item_idx)) :]
        return update.with_content(self._details(processor.image_id_tokens(new_item_idx) + unnumbered))

    def _apply_prompt_updates(self, token_ids: list[int], mm_prompt_updates: Any) -> Any:
        """The prompt with its media; clips after one that is split are numbered on from its windows."""
        updates = [update for [update] in mm_prompt_updates.get("audio", [])]
        windows = [self._windows_in(update.content.full) for update in updates]
        if any(len(clip) > 1 for clip in windows):
            processor = self.info.get_hf_processor()
            numbers = list(accumulate(map(len, windows), initial=1))
            joined = [processor.joined_windows(clip, number) for clip, number in zip(windows, numbers, strict=False)]
            renumbered = [
                [update.with_content(self._details(ids))] for update, ids in zip(updates, joined, strict=True)
            ]
            mm_prompt_updates = {**mm_prompt_updates, "audio": renumbered}
            token_ids = self._renumbered(token_ids, numbers)
        return super()._apply_prompt_updates(token_ids, mm_prompt_updates)

    def _windows_in(self, ids: Sequence[int]) -> list[list[int]]:
        """The tokens of each window of a clip's, without what stands between them."""
        opening, closing = self.info.get_tokenizer().convert_tokens_to_ids(list(AUDIO_ENDS))
        begins = [place for place, token in enumerate(ids) if token == opening]
        ends = [place + 1 for place, token in enumerate(ids) if token == closing]
        return [list(ids[begin:end]) for begin, end in zip(begins, ends, strict=True)]

    def _renumbered(self, prompt: Sequence[int], numbers: Sequence[int]) -> list[int]:
        """The prompt, in which the two end tokens stand for each clip, with other numbers before the clips."""
        processor, tokenizer = self.info.get_hf_processor(), self.info.get_tokenizer()
        added = set(tokenizer.get_added_vocab().values())
        opening = tokenizer.convert_tokens_to_ids(AUDIO_ENDS[0])
        prefix = processor.template.audio_prefix
        runs = [(is_special, list(run)) for is_special, run in groupby(prompt, key=added.__contains__)]
        renumbered: list[int] = []
        clip = 0
        for (is_special, ids), (_, following) in zip(runs, [*runs[1:], (True, [0])], strict=True):
            if is_special:
                clip += ids.count(opening)
            elif following[0] == opening and (text := tokenizer.decode(ids)).endswith(prefix.format(number=clip + 1)):
                old, new = (prefix.format(number=number) for number in (clip + 1, numbers[clip]))
                ids = processor.text_tokens(text.removesuffix(old) + new)
            renumbered += ids
        return renumbered

    def _details(self, ids: list[int]) -> PromptUpdateDetails:
        return PromptUpdateDetails.select_token_id(ids, self.info.get_tokenizer().convert_tokens_to_ids(PLACE))
