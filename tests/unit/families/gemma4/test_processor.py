"""Ids, places and features, against transformers' own processor."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, Gemma4Processor
from transformers.models.gemma4.feature_extraction_gemma4 import Gemma4AudioFeatureExtractor
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

from tests.unit.families.conversations import MIXED, clip, image, record, sound
from tests.unit.families.gemma4.builders import TINY, write_model
from train.commands.options import compose_options
from train.config import Options
from train.engine.build_model import check_family
from train.errors import BadRecord, CheckpointError, ConfigError
from train.families.gemma4 import GEMMA4
from train.families.gemma4.geometry import clip_places, mel_frames
from train.families.gemma4.processor import Gemma4Processor as Ours
from train.families.gemma4.towers import coordinates
from train.families.megrezo import MEGREZO
from train.schema import Part, Record, Turn
from train.sources import load_processor

RATE = 16_000
PLACES = 70
"""The least budget that transformers' image processor takes."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("gemma") / "model", image_places=PLACES)


@pytest.fixture
def processor(folder: Path) -> Ours:
    return GEMMA4.load_processor(folder)


@pytest.fixture(scope="module")
def stock() -> Gemma4Processor:
    """transformers' processor without one for videos, which needs torchvision even to be made."""
    made = object.__new__(Gemma4Processor)
    made.tokenizer = AutoTokenizer.from_pretrained(TINY)
    made.image_processor = Gemma4ImageProcessorPil(max_soft_tokens=PLACES, patch_size=12, pooling_kernel_size=3)
    made.feature_extractor = Gemma4AudioFeatureExtractor()
    for name in ("boi_token", "image_token", "eoi_token", "boa_token", "audio_token", "eoa_token"):
        setattr(made, name, getattr(made.tokenizer, name))
    return made


def alone(kind: str, content: bytes) -> Record:
    return Record((Turn("user", (Part(kind, content),)), Turn("assistant", (Part("text", "x"),))))


def test_images_of_60_sizes(processor: Ours, stock: Any) -> None:
    random = np.random.default_rng(0)
    for seed in range(60):
        width, height = (int(side) for side in np.exp(random.uniform(np.log(20), np.log(700), 2)))
        media = processor.encode(alone("image", image(width, height, seed))).media["image"]
        pixels = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))
        expected = stock.image_processor(pixels, return_tensors="pt")
        at, raw = coordinates(*media.sizes[0].tolist(), 3), expected["pixel_values"][0]
        assert len(media.places) == expected["num_soft_tokens_per_image"][0]
        by_place = {tuple(place): row for row, place in enumerate(expected["image_position_ids"][0].tolist())}
        order = [by_place[tuple(place)] for place in at.tolist()]
        assert sorted(order) == list(range(len(media.values)))
        torch.testing.assert_close(media.values * (1 / 255), raw[order].float(), atol=1e-6, rtol=0)


def test_clips_of_100_lengths(processor: Ours, stock: Any) -> None:
    random = np.random.default_rng(0)
    lengths = [*map(int, np.exp(random.uniform(np.log(161), np.log(80_000), 96))), 16_000, 161, 320, 480_000]
    for seed, length in enumerate(lengths):
        media = processor.encode(alone("audio", clip(length, seed))).media["audio"]
        out = stock.feature_extractor([sound(length, seed)], return_tensors="np")
        frames = out["input_features_mask"][0]
        places = stock.replace_audio_token(out, 0).count(stock.audio_token)
        assert len(media.places) == places == clip_places(mel_frames(length))
        assert media.sizes.tolist() == [frames.sum()]
        np.testing.assert_allclose(media.values.numpy(), out["input_features"][0][frames], atol=1e-5)


def test_ids_are_those_of_the_chat_template_with_the_places_filled_in(processor: Ours, stock: Any) -> None:
    for one in MIXED:
        messages = [{"role": turn.role, "content": [_item(part) for part in turn.parts]} for turn in one.turns]
        text = stock.tokenizer.apply_chat_template(messages, tokenize=False)
        found = processor._lay_out(one, False, None, "quarantine")
        for kind in ("image", "audio"):
            first, place, last = (f"<|{kind}>", f"<|{kind}|>", f"<{kind}|>")
            pieces = text.split(place)
            fills = [first + place * len(medium.places) + last for medium in found.of(kind)]
            text = "".join(piece + fill for piece, fill in zip(pieces, [*fills, ""], strict=True))
        assert text.startswith("<bos><|turn>")
        assert processor.encode(one).input_ids.tolist() == stock.tokenizer(text, add_special_tokens=False)["input_ids"]
        prompt = stock.tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        assert prompt.endswith("<turn|>\n<|turn>model\n")


def _item(part: Part) -> dict[str, Any]:
    return {"type": part.kind, part.kind: part.content if part.kind == "text" else "there"}


def test_an_answer_is_learned_with_its_end(processor: Ours) -> None:
    sample = processor.encode(MIXED[0])
    assert processor.tokenizer.decode(sample.input_ids[sample.loss_weights > 0]) == "A cat.<turn|>\n"


def test_lengths_are_known_from_headers(processor: Ours) -> None:
    for one in MIXED:
        sample, measured = processor.encode(one), processor.measure(one)
        assert measured.tokens == len(sample.input_ids)
        assert measured.units == {kind: len(media.values) for kind, media in sample.media.items()}


@pytest.mark.parametrize(
    ("part", "said"),
    [
        (("audio", 160), "of 160 samples is too short to be heard"),
        (("audio", 480_160), r"of 30.0 s is longer than 30 s; split it, or set data.long_audio=cut"),
    ],
)
def test_media_that_cannot_be_used_are_refused(part: Any, said: str, processor: Ours) -> None:
    with pytest.raises(BadRecord, match=said):
        processor.encode(record(("user", [part]), ("assistant", ["x"])))


def test_a_long_recording_is_cut_where_that_is_wanted(processor: Ours) -> None:
    processor.long_audio = "cut"
    sample = processor.encode(record(("user", [("audio", 500_000)]), ("assistant", ["x"])))
    assert len(sample.media["audio"].places) == 750


@pytest.mark.parametrize(("places", "count"), [(None, 70), (4, 4), (20, 16)])
def test_the_budget_is_an_option(places: int | None, count: int, folder: Path) -> None:
    options = Options()
    options.data.image_places = places
    processor = load_processor(options, GEMMA4, folder)
    sample = processor.encode(record(("user", [("image", (112, 112))]), ("assistant", ["x"])))
    assert len(sample.media["image"].places) == (64 if places is None else count)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run.compile=true"], "run.compile: the layers of a gemma4 model cannot be compiled"),
        (
            ["+recipe=lora", "lora.modules=[llm,per_layer_table]", "modules.tune_per_layer_table=true"],
            "lora.modules: per_layer_table has no linear layer to adapt",
        ),
    ],
)
def test_options_that_the_family_lacks_are_refused(words: list[str], said: str) -> None:
    options, _ = compose_options(["model=tiny_gemma4", *words])
    with pytest.raises(ConfigError, match=said):
        check_family(options, GEMMA4)


def test_the_budget_is_refused_where_there_is_none() -> None:
    options = Options()
    options.data.image_places = 70
    with pytest.raises(ConfigError, match="a megrezo model has no such budget"):
        load_processor(options, MEGREZO, TINY.parent / "tiny")


@pytest.mark.parametrize(
    ("part", "changes", "said"),
    [
        ("image_processor", {"do_normalize": True}, "do_normalize is True"),
        ("image_processor", {"patch_size": 16}, "patch_size is 16, where only 12"),
        ("feature_extractor", {"feature_size": 80}, "feature_size is 80, where only 128"),
        ("image_processor", {"max_soft_tokens": 0}, "max_soft_tokens is 0"),
    ],
)
def test_settings_that_are_not_implemented_are_refused(part: str, changes: dict, said: str, tmp_path: Path) -> None:
    for file in TINY.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = json.loads((TINY / "processor_config.json").read_text())
    settings[part] |= changes
    (tmp_path / "processor_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=said):
        GEMMA4.load_processor(tmp_path)


@pytest.mark.parametrize(
    ("part", "changes", "said"),
    [
        ("text_config", {"enable_moe_block": True}, "text_config.enable_moe_block is True"),
        ("text_config", {"use_bidirectional_attention": "vision"}, "use_bidirectional_attention is 'vision'"),
        ("text_config", {"final_logit_softcapping": 0.0}, "final_logit_softcapping is 0.0"),
        ("audio_config", {"attention_context_right": 2}, "audio_config.attention_context_right is 2"),
        ("audio_config", None, "audio_config is missing; take E2B or E4B"),
    ],
)
def test_other_models_of_the_series_are_refused(part: str, changes: Any, said: str, tmp_path: Path) -> None:
    config = json.loads((TINY / "config.json").read_text())
    config[part] = None if changes is None else config[part] | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=said):
        GEMMA4.config(tmp_path)
