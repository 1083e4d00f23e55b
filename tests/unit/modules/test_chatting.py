"""`chat`: what the model says to conversations, at once, together and piece by piece."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM

import train.auto  # noqa: F401
from tests.runs import write_small_model
from train.errors import BadRecord
from train.export.model_folder import write_random_model
from train.families.megrezo.model import MegrezO

IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8))
CLIP = (np.random.default_rng(1).normal(0, 0.1, 8000).astype(np.float32), 16_000)
CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hello"}],
    [{"role": "user", "content": {"text": "What color is it?", "image": IMAGE, "audio": CLIP}}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "audio", "audio": CLIP}, {"type": "text", "text": "And?"}]},
        {"role": "assistant", "content": "red"},
        {"role": "user", "content": {"text": "Are you sure?", "image": [IMAGE, IMAGE]}},
    ],
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> MegrezO:
    """A random model from its folder, as a user loads it; its processor is found when it is needed."""
    folder = tmp_path_factory.mktemp("chat")
    write_random_model(write_small_model(folder), folder / "export", seed=0)
    return AutoModelForCausalLM.from_pretrained(folder / "export")


def greedy_without_cache(model: MegrezO, messages: list[dict[str, Any]], count: int) -> str:
    """The answer by the argmax of the packed forward, over and over."""
    batch = model.processor.prompts([messages], max_tokens=4096)
    said: list[int] = []
    while len(said) < count:
        token = int(model.logits(batch)[-1].argmax())
        if token in torch.tensor(model.generation_config.eos_token_id):
            break
        said.append(token)
        length = len(batch.input_ids)
        batch = replace(
            batch,
            input_ids=torch.cat([batch.input_ids, torch.tensor([token])]),
            position_ids=torch.arange(length + 1),
            cu_seqlens=torch.tensor([0, length + 1], dtype=torch.int32),
        )
    return model.processor.tokenizer.decode(said, skip_special_tokens=True)


@torch.no_grad()
def test_greedy_answers_are_those_of_the_uncached_forward(model: MegrezO) -> None:
    for messages in CONVERSATIONS:
        expected = greedy_without_cache(model, messages, 8)
        assert model.chat(messages, sampling=False, max_new_tokens=8, temperature=0) == expected
        assert "".join(model.chat(messages, max_new_tokens=8, stream=True)) == expected


def test_conversations_together_are_answered_as_one_by_one(model: MegrezO) -> None:
    together = model.chat(CONVERSATIONS, max_new_tokens=12)
    assert together == [model.chat(messages, max_new_tokens=12) for messages in CONVERSATIONS]
    assert len(set(together)) == 3


def test_a_stream_is_the_answer_in_pieces(model: MegrezO) -> None:
    how = {"sampling": True, "temperature": 2.0, "top_p": 0.99, "max_new_tokens": 64}
    torch.manual_seed(0)
    whole = model.chat(CONVERSATIONS[1], **how)
    torch.manual_seed(0)
    pieces = list(model.chat(CONVERSATIONS[1], stream=True, **how))
    assert "".join(pieces) == whole
    assert len(pieces) > 4
    assert all(pieces)


def test_a_low_top_p_draws_the_likeliest_token(model: MegrezO) -> None:
    drawn = model.chat(CONVERSATIONS[0], sampling=True, temperature=1.0, top_p=1e-6, max_new_tokens=8)
    assert drawn == model.chat(CONVERSATIONS[0], max_new_tokens=8)


def test_a_repetition_penalty_lets_no_token_come_again(model: MegrezO) -> None:
    [ids] = model.generate(
        model.processor.prompts([CONVERSATIONS[0]], max_tokens=4096),
        max_new_tokens=16,
        do_sample=False,
        repetition_penalty=1e4,
    )
    assert len(ids) == len(set(ids.tolist())) > 8


def test_a_stream_that_is_left_ends_the_generation(model: MegrezO) -> None:
    steps: list[int] = []
    hook = model.llm.register_forward_hook(lambda *_: steps.append(0))
    stream = model.chat(CONVERSATIONS[0], sampling=True, temperature=2.0, max_new_tokens=3000, stream=True)
    next(stream)
    stream.close()
    hook.remove()
    assert len(steps) < 1500


@pytest.mark.timeout(60)
def test_faults_reach_the_caller(model: MegrezO) -> None:
    with pytest.raises(ValueError, match="top_k"):
        list(model.chat(CONVERSATIONS[0], sampling=True, top_k=-1, stream=True))
    with pytest.raises(BadRecord, match=r"image 'absent.png' not found; fix the path"):
        model.chat([{"role": "user", "content": {"image": Path("absent.png")}}], stream=True)
    with pytest.raises(ValueError, match="one conversation can be streamed"):
        model.chat(CONVERSATIONS, stream=True)
    with pytest.raises(BadRecord, match="no turns found"):
        model.chat([])
