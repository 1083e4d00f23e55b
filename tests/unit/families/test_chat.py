"""`Chat` and the model's own `chat` with images and recordings in every form, in the families that transformers has."""

import pytest
import torch

from tests.unit.families.conversations import MIXED, clip, image, packed, sound
from tests.unit.families.gemma4.builders import write_model as write_gemma
from tests.unit.families.qwen_omni.builders import write_model as write_qwen
from train.errors import BadRecord
from train.inference.chat import Chat


@pytest.fixture(scope="module", params=[write_qwen, write_gemma], ids=["qwen_omni", "gemma4"])
def chat(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Chat:
    torch.manual_seed(0)
    return Chat.load(request.param(tmp_path_factory.mktemp("model") / "model"), device="cpu")


@pytest.mark.parametrize(
    "content",
    [
        "Hello",
        {"text": "What is it?", "image": image(60, 90)},
        {"text": "What is said?", "audio": (sound(20_000), 16_000)},
        [
            {"type": "audio", "audio": clip(50_000)},
            {"type": "text", "text": "and"},
            {"type": "image", "image": image(90, 60)},
        ],
    ],
    ids=["text", "image", "audio", "mixed"],
)
def test_an_answer_comes_whole_or_piece_by_piece(content: object, chat: Chat) -> None:
    assert chat.media == {"image", "audio"}
    talk = [{"role": "user", "content": content}]
    assert "".join(chat.answer(talk, max_new_tokens=6)) == chat.model.chat(talk, max_new_tokens=6)


def test_prompts_of_unequal_length_are_answered_as_if_alone(chat: Chat) -> None:
    """Positions are those of each prompt, not of the padded row."""
    prompts = [chat.model.processor.prompt(one) for one in MIXED]
    together = chat.model.generate(packed(prompts), max_new_tokens=6)
    for prompt, answer in zip(prompts, together, strict=True):
        [alone] = chat.model.generate(packed([prompt]), max_new_tokens=6)
        assert answer.tolist() == alone.tolist()


@pytest.mark.parametrize(
    ("content", "said"),
    [({"text": "What?", "video": "a.mp4"}, "'video'"), ([{"type": "video", "video": "a.mp4"}], "'video'")],
)
def test_video_is_refused_by_name(content: object, said: str, chat: Chat) -> None:
    with pytest.raises(BadRecord, match=said):
        chat.model.chat([{"role": "user", "content": content}])
