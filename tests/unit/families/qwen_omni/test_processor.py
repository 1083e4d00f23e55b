"""Ids, places and features, against transformers' own processor."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, Qwen2_5OmniProcessor, WhisperFeatureExtractor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from tests.unit.families.conversations import MIXED, RATE, clip, image, record, sound
from tests.unit.families.qwen_omni.builders import TINY, write_model
from train.errors import BadRecord, CheckpointError
from train.families.qwen_omni import QWEN_OMNI
from train.families.qwen_omni.geometry import clip_places, image_pixels, mel_frames
from train.families.qwen_omni.processor import QwenOmniProcessor
from train.families.qwen_omni.towers import normalised
from train.schema import Part, Record, Turn

MOST = 300 * 300


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> QwenOmniProcessor:
    return QWEN_OMNI.load_processor(write_model(tmp_path_factory.mktemp("qwen") / "model", max_pixels=MOST))


@pytest.fixture(scope="module")
def stock() -> Qwen2_5OmniProcessor:
    """transformers' processor without one for videos, which needs torchvision even to be made."""
    made = object.__new__(Qwen2_5OmniProcessor)
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    made.tokenizer, made.video_processor = tokenizer, None
    made.image_processor = Qwen2VLImageProcessorPil(min_pixels=56**2, max_pixels=MOST)
    made.feature_extractor = WhisperFeatureExtractor(feature_size=128, chunk_length=300)
    made.chat_template = (TINY / "chat_template.jinja").read_text()
    for name in ("image", "audio", "video"):
        setattr(made, f"{name}_token", getattr(tokenizer, f"{name}_token"))
        setattr(made, f"{name}_token_id", getattr(tokenizer, f"{name}_token_id"))
    return made


def stock_features(stock: Qwen2_5OmniProcessor, kind: str, content: Any) -> tuple[np.ndarray, int]:
    """What transformers' processor makes of an image or clip, and its places."""
    if kind == "image":
        out, texts = stock._process_images([content])
        return out["pixel_values"], texts[0].count(stock.image_token)
    out, texts = stock._process_audio([content], sampling_rate=RATE, return_attention_mask=True)
    frames = int(np.asarray(out["feature_attention_mask"]).sum())
    return np.asarray(out["input_features"])[0, :, :frames].T, texts[0].count(stock.audio_token)


def alone(kind: str, content: bytes) -> Record:
    return Record((Turn("user", (Part(kind, content),)), Turn("assistant", (Part("text", "x"),))))


def test_images_of_200_sizes(processor: QwenOmniProcessor, stock: Any) -> None:
    random = np.random.default_rng(0)
    for seed in range(200):
        width, height = (int(side) for side in np.exp(random.uniform(np.log(6), np.log(700), 2)))
        encoded = processor.encode(alone("image", image(width, height, seed)))
        pixels = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))
        expected, places = stock_features(stock, "image", pixels)
        media = encoded.media["image"]
        assert len(media.places) == places
        assert encoded.input_ids[media.places].eq(stock.image_token_id).all()
        assert int(media.sizes.prod()) == len(media.values)
        np.testing.assert_allclose(normalised(media.values).numpy(), expected, atol=2e-6)


def test_clips_of_200_lengths(processor: QwenOmniProcessor, stock: Any) -> None:
    random = np.random.default_rng(0)
    stock.feature_extractor = WhisperFeatureExtractor(feature_size=128, chunk_length=300)
    lengths = [*map(int, np.exp(random.uniform(np.log(500), np.log(80_000), 196))), 16_000, 16_001, 15_999, 320_160]
    for seed, length in enumerate(lengths):
        encoded = processor.encode(alone("audio", clip(length, seed)))
        media = encoded.media["audio"]
        # 10 s of padding give the frames that 300 s of it give, in a thirtieth of the time (checked on a few).
        stock.feature_extractor.n_samples = 4_800_000 if seed % 50 == 0 else length // 160 * 160 + 160_000
        expected, places = stock_features(stock, "audio", sound(length, seed))
        assert len(media.places) == places
        assert encoded.input_ids[media.places].eq(stock.audio_token_id).all()
        assert media.sizes.tolist() == [len(expected)]
        np.testing.assert_allclose(media.values.numpy(), expected, atol=1e-5)


def test_ids_are_those_of_the_chat_template_with_the_places_filled_in(processor: Any, stock: Any) -> None:
    for one in MIXED:
        messages = [{"role": turn.role, "content": [_item(part) for part in turn.parts]} for turn in one.turns]
        text = stock.tokenizer.apply_chat_template(messages, tokenize=False)
        sample = processor.encode(one)
        for kind in ("image", "audio"):
            token = f"<|{kind.upper()}|>"
            counts = [
                processor._units(medium) for medium in processor._lay_out(one, False, None, "quarantine").of(kind)
            ]
            pieces = text.split(token)
            assert len(pieces) == len(counts) + 1
            places = [count // 4 if kind == "image" else (count + 1) // 2 // 2 for count in counts]
            text = "".join(piece + token * n for piece, n in zip(pieces, [*places, 0], strict=True))
        assert sample.input_ids.tolist() == stock.tokenizer(text)["input_ids"]
        assert stock.tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True).endswith(
            "<|im_start|>assistant\n"
        )


def _item(part: Part) -> dict[str, Any]:
    return {"type": part.kind, part.kind: part.content if part.kind == "text" else "there"}


def test_an_answer_is_learned_with_its_end(processor: QwenOmniProcessor) -> None:
    sample = processor.encode(MIXED[0])
    learned = sample.input_ids[sample.loss_weights > 0]
    assert processor.tokenizer.decode(learned) == "A cat.<|im_end|>\n"


def test_lengths_are_known_from_headers(processor: QwenOmniProcessor) -> None:
    for one in MIXED:
        sample, measured = processor.encode(one), processor.measure(one)
        assert measured.tokens == len(sample.input_ids)
        assert measured.units == {kind: len(media.values) for kind, media in sample.media.items()}


def test_sizes_of_images_are_those_of_smart_resize() -> None:
    random = np.random.default_rng(1)
    for width, height in random.integers(1, 4000, (2000, 2)).tolist():
        if max(width, height) > 200 * min(width, height):
            continue
        mine = image_pixels(width, height, multiple=28, least=3136, most=1_003_520)
        assert mine[::-1] == smart_resize(height, width, 28, 3136, 1_003_520)


def test_places_of_a_clip_of_an_hour() -> None:
    assert clip_places(mel_frames(3600 * RATE)) == 90_000
    assert [clip_places(frames) for frames in (1, 2, 3, 200, 201, 300)] == [0, 0, 1, 50, 50, 75]


def test_a_recording_of_a_minute_is_heard_whole(processor: QwenOmniProcessor) -> None:
    sample = processor.encode(alone("audio", clip(60 * RATE)))
    assert len(sample.media["audio"].places) == 1500


@pytest.mark.parametrize(
    ("part", "said"),
    [
        (("image", (2, 500)), "2x500 pixels, and one side may be 200 times as long"),
        (("audio", 200), "of 200 samples is too short to be heard"),
    ],
)
def test_media_that_cannot_be_used_are_refused(part: Any, said: str, processor: QwenOmniProcessor) -> None:
    with pytest.raises(BadRecord, match=said):
        processor.encode(record(("user", [part]), ("assistant", ["x"])))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"image_mean": [0.5, 0.5, 0.5]}, "image_mean is"),
        ({"patch_size": 16}, "patch_size is 16, where only 14"),
        ({"feature_size": 80}, "feature_size is 80, where only 128"),
        ({"max_pixels": 0}, "max_pixels is 0"),
    ],
)
def test_settings_that_are_not_implemented_are_refused(changes: dict, said: str, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(CheckpointError, match=said):
        QWEN_OMNI.load_processor(folder)


def test_images_settings_in_their_newer_form(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    (folder / "preprocessor_config.json").unlink()
    image = {"size": {"shortest_edge": 3136, "longest_edge": 50_000}, "patch_size": 14, "merge_size": 2}
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": image, "feature_extractor": {}}))
    images = QWEN_OMNI.load_processor(folder).images
    assert (images.min_pixels, images.max_pixels) == (3136, 50_000)


def test_positions_after_an_image_go_on_behind_its_larger_side(processor: QwenOmniProcessor) -> None:
    sample = processor.encode(record(("user", [("image", (140, 84)), "x"]), ("assistant", ["y"])))
    places = sample.media["image"].places
    assert len(places) == 15
    first = int(places[0])
    after = sample.position_ids[:, first : first + 16]
    assert after[0].tolist() == [first] * 15 + [first + 5]
    assert after[1].tolist() == [first + row for row in (0, 1, 2) for _ in range(5)] + [first + 5]
    assert after[2].tolist() == [first + column for _ in range(3) for column in range(5)] + [first + 5]
    assert torch.equal(sample.position_ids[0, :first], torch.arange(first))
