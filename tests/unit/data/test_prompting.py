"""Media in whatever form a program holds them: all forms of one image or recording give the same batch."""

import base64
import io
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from tests.builders import media_of
from tests.unit.data.builders import tone
from train.errors import BadRecord
from train.families.megrezo.processor import MegrezOProcessor
from train.schema import Batch


def ask(processor: MegrezOProcessor, *contents: Any, max_tokens: int = 4096) -> Batch:
    """The batch of one-turn conversations."""
    return processor.prompts([[{"role": "user", "content": content}] for content in contents], max_tokens=max_tokens)


def assert_equal(found: Batch, expected: Batch) -> None:
    torch.testing.assert_close(asdict(found), asdict(expected), rtol=0, atol=0)


@pytest.fixture
def image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An image that EXIF turns by a quarter, in the working folder."""
    monkeypatch.chdir(tmp_path)
    upright = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    upright.save(tmp_path / "cat.png", exif=exif)
    return tmp_path / "cat.png"


@pytest.fixture
def recording(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two channels at 24 kHz, 16 bits."""
    monkeypatch.chdir(tmp_path)
    soundfile.write(tmp_path / "cat.wav", tone(0.5, 24_000, channels=2), 24_000)
    return tmp_path / "cat.wav"


def test_forms_of_an_image(processor: MegrezOProcessor, image: Path) -> None:
    expected = ask(processor, {"text": "What?", "image": str(image)})
    height, width = media_of(expected, "image").sizes[0].tolist()
    assert height > width  # upright
    url = f"data:image/png;base64,{base64.b64encode(image.read_bytes()).decode()}"
    with Image.open(image) as opened:
        forms = ["cat.png", Path("cat.png"), image.read_bytes(), url, opened, opened.convert("RGBA")]
        for form in forms:
            assert_equal(ask(processor, {"text": "What?", "image": form}), expected)
            listed = [{"type": "image", "image": form}, {"type": "text", "text": "What?"}]
            assert_equal(ask(processor, listed), expected)
        assert_equal(ask(processor, [{"type": "image_url", "image_url": {"url": url}}, *listed[1:]]), expected)
        two = ask(processor, {"image": [opened, "cat.png"]})
    assert len(media_of(two, "image").sizes) == 2 * len(media_of(expected, "image").sizes)


def test_forms_of_a_recording(processor: MegrezOProcessor, recording: Path) -> None:
    expected = ask(processor, {"audio": str(recording)})
    data = base64.b64encode(recording.read_bytes()).decode()
    for form in (
        Path("cat.wav"),
        recording.read_bytes(),
        soundfile.read(recording),
        soundfile.read(recording, dtype="float32"),
        soundfile.read(recording, dtype="int16"),
        (torch.from_numpy(soundfile.read(recording)[0]), 24_000),
    ):
        assert_equal(ask(processor, {"audio": form}), expected)
        assert_equal(ask(processor, [{"type": "audio", "audio": form}]), expected)
    assert_equal(ask(processor, [{"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}]), expected)


def test_string_list_and_mapping_are_one(processor: MegrezOProcessor) -> None:
    forms = ["hello", [{"type": "text", "text": "hello"}], {"text": "hello"}]
    batch = ask(processor, *forms)
    one, *others = batch.input_ids.split(batch.cu_seqlens.diff().tolist())
    assert all(torch.equal(one, other) for other in others)
    assert batch.records == [0, 1, 2]
    assert processor.tokenizer.decode(one) == (
        "<|role_start|>user<|role_end|>hello<|turn_end|><|role_start|>assistant<|role_end|>"
    )


@pytest.mark.parametrize(
    "content",
    [
        {"text": "Who?", "audio": "cat.wav", "image": ["cat.png", "cat.png"]},
        {"audio": ["cat.wav", "cat.wav"], "image": "cat.png"},
        [{"type": "audio", "audio": "cat.wav"}, {"type": "text", "text": "Who"}, {"type": "image", "path": "cat.png"}],
        [{"type": "image_url", "image_url": "cat.png"}, {"type": "audio", "url": "cat.wav"}],
    ],
)
def test_the_chat_template_puts_media_in_the_same_places(
    processor: MegrezOProcessor, image: Path, recording: Path, content: Any
) -> None:
    messages = [
        {"role": "system", "content": "Hello."},
        {"role": "user", "content": content},
        {"role": "assistant", "content": {"text": "A cat."}},
        {"role": "user", "content": [{"type": "audio", "audio": "cat.wav"}]},
    ]
    written = processor.tokenizer.decode(processor.prompts([messages], max_tokens=4096).input_ids)
    for kind in ("image", "audio"):
        written = re.sub(rf"<\|{kind}_start\|>.*?<\|{kind}_end\|>", f"(<{kind}>./</{kind}>)", written)
    # A number stands before each image; these have one slice, the thumbnail.
    written = re.sub(r"<\|image_id_start\|>[0-9]<\|image_id_end\|>", "", written)
    rendered = processor.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert written == rendered


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ({"image": "dog.png"}, r"^image 'dog.png' not found; fix the path$"),
        ({"audio": "/nowhere/dog.wav"}, r"^audio '/nowhere/dog.wav' not found; fix the path$"),
        ({"image": "note.txt"}, r"^image '.*/note.txt': it begins with b'hello', which is no intact JPEG"),
        ({"image": "https://example.org/a.png"}, "is a URL, and nothing is fetched"),
        ({"audio": (16_000, np.zeros(8, np.float32))}, r"^audio given as a tuple cannot be used .*samples, rate in Hz"),
        ({"audio": (np.zeros(8, np.float32),)}, "audio given as a tuple cannot be used"),
        ({"audio": (np.zeros(8, complex), 16_000)}, "audio given as a tuple cannot be used"),
        ({"text": "hello" * 200}, "the conversation has 218 tokens, and the model takes 100 with its answer"),
        ({"video": "cat.mp4"}, "unknown key 'video'"),
    ],
)
def test_faults(
    processor: MegrezOProcessor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: Any, fault: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "note.txt").write_text("hello")
    with pytest.raises(BadRecord, match=fault):
        ask(processor, content, max_tokens=100)


def test_images_of_a_program_may_be_of_any_mode(processor: MegrezOProcessor) -> None:
    for mode in ("L", "P", "CMYK", "F", "I;16"):
        batch = ask(processor, {"image": Image.new(mode, (30, 30))})
        assert len(media_of(batch, "image").sizes) == 1, mode


def test_an_encoded_image_may_be_a_stream_of_bytes(processor: MegrezOProcessor) -> None:
    file = io.BytesIO()
    Image.new("RGB", (30, 30), "red").save(file, "JPEG")
    assert media_of(ask(processor, {"image": file.getvalue()}), "image").values.float().mean(0)[0] > 250
