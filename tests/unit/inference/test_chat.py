"""`Chat`: a model folder that answers, whatever its family."""

import os
from pathlib import Path

import pytest

from tests.runs import ROOT
from train.errors import BadRecord
from train.export.model_folder import write_random_model
from train.inference.chat import Chat

HELLO = [{"role": "user", "content": "Hello"}]


def load(folder: Path, name: str, **how) -> Chat:
    write_random_model(ROOT / "data" / name, folder / name, seed=0)
    return Chat.load(folder / name, device="cpu", **how)


@pytest.mark.parametrize("name", ["tiny_instruct", "tiny_minicpm"])
def test_models_of_text_alone(tmp_path: Path, name: str) -> None:
    chat = load(tmp_path, name)
    assert chat.media == set()
    assert "".join(chat.answer(HELLO, max_new_tokens=8)) == chat.model.chat(HELLO, max_new_tokens=8)
    image = {"text": "What is it?", "image": os.fspath(ROOT / "data/sample/images/heldout/0001.png")}
    with pytest.raises(BadRecord, match="it holds an image, and this model reads text alone"):
        chat.answer([{"role": "user", "content": image}])


def test_an_omni_model_takes_the_system_prompt_that_it_is_given(tmp_path: Path) -> None:
    chat = load(tmp_path, "tiny", system_prompt="Be brief.")
    assert chat.media == {"image", "audio"}
    batch = chat.model.processor.prompts([HELLO], max_tokens=100)
    written = chat.model.processor.tokenizer.decode(batch.input_ids)
    assert written.startswith(
        "<|role_start|>system<|role_end|>Be brief.<|turn_end|><|role_start|>user<|role_end|>Hello"
    )
