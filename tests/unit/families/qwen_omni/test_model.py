"""The thinker over packs, against transformers' own model with the same weights."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from tests.unit.families.conversations import MIXED, packed, samples
from tests.unit.families.qwen_omni.builders import TINY, write_model
from train.families.qwen_omni import QWEN_OMNI
from train.families.qwen_omni.model import Qwen2_5OmniForConditionalGeneration
from train.families.qwen_omni.processor import QwenOmniProcessor
from train.families.qwen_omni.stock import stock_inputs
from train.modules.trainable import FROZEN, module_of

RENAMED = {"model.language_model.": "model.", "model.visual.": "visual.", "model.audio_tower.": "audio_tower."}
"""What transformers calls its parts, and what they are called in the published files."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return write_model(tmp_path_factory.mktemp("qwen") / "model")


@pytest.fixture
def model(folder: Path) -> Qwen2_5OmniForConditionalGeneration:
    return QWEN_OMNI.load_model(folder).train()


@pytest.fixture
def stock(folder: Path) -> transformers.Qwen2_5OmniThinkerForConditionalGeneration:
    return transformers.Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(folder).train()


@pytest.fixture(scope="module")
def processor(folder: Path) -> QwenOmniProcessor:
    return QWEN_OMNI.load_processor(folder)


def test_logits_are_those_of_transformers_one_by_one_and_packed(model, stock, processor) -> None:
    found = samples(processor)
    with torch.no_grad():
        together = model.logits(packed(found)).split([len(sample.input_ids) for sample in found])
        for sample, in_pack in zip(found, together, strict=True):
            expected = stock(**stock_inputs(sample)).logits[0]
            assert expected.abs().max() > 1
            torch.testing.assert_close(model.logits(packed([sample])), expected, atol=1e-4, rtol=0)
            torch.testing.assert_close(in_pack, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_transformers(checkpointing: bool, model, stock, processor) -> None:
    found = samples(processor)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model(packed(found)).loss_sum.backward()
    for sample in found:
        logits = stock(**stock_inputs(sample)).logits[0, :-1]
        F.cross_entropy(logits, sample.labels[1:], reduction="sum").backward()
    by_module: dict[str, list[tuple[Tensor, Tensor]]] = {}
    ours = dict(model.named_parameters())
    for name, parameter in stock.named_parameters():
        for theirs, published in RENAMED.items():
            name = name.replace(theirs, published) if name.startswith(theirs) else name
        module = module_of(f"thinker.{name}", QWEN_OMNI.rules)
        if module == FROZEN:
            assert parameter.grad is None  # nothing uses it
            continue
        pair = ours[f"thinker.{name}"].grad.flatten().double(), parameter.grad.flatten().double()
        by_module.setdefault(module, []).append(pair)
    assert set(by_module) == QWEN_OMNI.modules
    for module, pairs in by_module.items():
        mine, theirs = (torch.cat(side) for side in zip(*pairs, strict=True))
        assert torch.cosine_similarity(mine, theirs, dim=0) >= 0.999999, module
        assert abs(mine.norm() / theirs.norm() - 1) <= 1e-5, module


def test_greedy_answers_are_those_of_transformers(model, stock, processor) -> None:
    prompts = [processor.prompt(one) for one in MIXED]
    model.eval(), stock.eval()
    options = {"max_new_tokens": 8, "do_sample": False}
    answers = model.generate(packed(prompts), **options)
    for prompt, answer in zip(prompts, answers, strict=True):
        ends = model.generation_config.eos_token_id
        whole = stock.generate(**stock_inputs(prompt), eos_token_id=ends, **options)[0, len(prompt.input_ids) :]
        expected = [token for token in whole.tolist() if token not in ends]
        assert answer.tolist() == expected
        assert expected


@pytest.mark.parametrize("which", range(5))
def test_text_alone_or_any_mix_gives_every_trained_parameter_a_gradient(which: int, model, processor) -> None:
    model(packed([samples(processor)[which]])).loss_sum.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (module_of(name, QWEN_OMNI.rules) == FROZEN), name


@pytest.mark.parametrize("replaced", range(5))
def test_a_sample_changes_no_bit_of_the_others(replaced: int, model, processor) -> None:
    found = samples(processor)
    others = list(found)
    others[replaced] = processor.encode(MIXED[replaced - 1])
    with torch.no_grad():
        before, after = (
            model.logits(packed(some)).split([len(sample.input_ids) for sample in some]) for some in (found, others)
        )
    for number in range(5):
        if number != replaced:
            torch.testing.assert_close(before[number], after[number], atol=2e-5, rtol=0)


def test_frequencies_stay_exact_when_the_model_is_cast(model) -> None:
    exact = {name: buffer.clone() for name, buffer in model.named_buffers() if "inv_freq" in name}
    model.bfloat16()
    assert len(exact) == 4
    for name, buffer in exact.items():
        assert torch.equal(model.get_buffer(name), buffer)


def test_the_first_window_of_a_clip_is_what_it_is_alone(model, processor) -> None:
    """Recordings of any length are heard as they are: 2 s see nothing of what follows."""
    mel = torch.randn(6_700, 128, generator=torch.Generator().manual_seed(0))
    tower = model.thinker.audio_tower.eval()
    with torch.no_grad():
        whole, first = tower(mel, torch.tensor([6_700])), tower(mel[:200], torch.tensor([200]))
    assert len(whole) == 1675
    torch.testing.assert_close(whole[:50], first, atol=1e-5, rtol=0)


def test_random_weights_have_the_configured_spread() -> None:
    model = QWEN_OMNI.random_model(TINY, seed=0)
    for name in ("model.layers.0.mlp.up_proj", "visual.patch_embed.proj", "audio_tower.layers.0.fc1", "lm_head"):
        assert model.thinker.get_submodule(name).weight.detach().std() == pytest.approx(0.08, rel=0.05), name
    table = model.thinker.audio_tower.positional_embedding.positional_embedding
    assert table[:, 0].allclose(torch.arange(1500.0).sin(), atol=1e-4)
