"""The model over packs, against transformers' own with the same weights."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from tests.unit.families.conversations import MIXED, packed, samples
from tests.unit.families.gemma4.builders import TINY, write_model
from train.families.gemma4 import GEMMA4
from train.families.gemma4.model import Gemma4ForConditionalGeneration
from train.families.gemma4.processor import Gemma4Processor
from train.families.gemma4.stock import stock_inputs
from train.modules.layers import checkpoint_layers
from train.modules.trainable import choose_trainable, module_of

LEARNING = GEMMA4.modules - {"per_layer_table"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return write_model(tmp_path_factory.mktemp("gemma") / "model", head_dim=512)


@pytest.fixture
def model(folder: Path) -> Gemma4ForConditionalGeneration:
    return GEMMA4.load_model(folder).train()


@pytest.fixture
def stock(folder: Path) -> transformers.Gemma4ForConditionalGeneration:
    return transformers.Gemma4ForConditionalGeneration.from_pretrained(folder, attn_implementation="eager").train()


@pytest.fixture(scope="module")
def processor(folder: Path) -> Gemma4Processor:
    return GEMMA4.load_processor(folder)


def test_logits_are_those_of_transformers_one_by_one_and_packed(model, stock, processor) -> None:
    found = samples(processor)
    window = model.llm.config.sliding_window
    assert sum(len(sample.input_ids) > 2 * window for sample in found) >= 3
    with torch.no_grad():
        together = model.logits(packed(found)).split([len(sample.input_ids) for sample in found])
        for sample, in_pack in zip(found, together, strict=True):
            expected = stock(**stock_inputs(sample)).logits[0]
            assert 10 < expected.abs().max() < 30  # where the cap of 30 has bent them
            torch.testing.assert_close(model.logits(packed([sample])), expected, atol=1e-4, rtol=0)
            torch.testing.assert_close(in_pack, expected, atol=1e-4, rtol=0)


def test_gradients_are_those_of_transformers_and_the_same_when_checkpointed(model, stock, processor) -> None:
    found = samples(processor)
    choose_trainable(model, GEMMA4.rules, tuned=GEMMA4.modules)
    batch = packed(found)
    model(batch).loss_sum.backward()
    ours = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    checkpoint_layers(model, llm=1, towers=1)
    model(batch).loss_sum.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, ours[name], rtol=1e-5, atol=1e-5 * ours[name].abs().max().item())
    for sample in found:
        logits = stock(**stock_inputs(sample)).logits[0, :-1]
        F.cross_entropy(logits, sample.labels[1:], reduction="sum").backward()
    by_module: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for name, parameter in stock.named_parameters():
        pair = ours[name].flatten().double(), parameter.grad.flatten().double()
        by_module.setdefault(module_of(name, GEMMA4.rules), []).append(pair)
    assert set(by_module) == GEMMA4.modules
    for module, pairs in by_module.items():
        mine, theirs = (torch.cat(side) for side in zip(*pairs, strict=True))
        assert torch.cosine_similarity(mine, theirs, dim=0) >= 0.999999, module
        assert abs(mine.norm() / theirs.norm() - 1) <= 1e-5, module


def test_greedy_answers_are_those_of_transformers(model, stock, processor) -> None:
    prompts = [processor.prompt(one) for one in MIXED]
    model.eval(), stock.eval()
    options = {"max_new_tokens": 8, "do_sample": False}
    answers, static = (
        model.generate(packed(prompts), **options, **more) for more in ({}, {"cache_implementation": "static"})
    )
    ends = model.generation_config.eos_token_id
    for prompt, answer, other in zip(prompts, answers, static, strict=True):
        whole = stock.generate(**stock_inputs(prompt), eos_token_id=ends, **options)[0, len(prompt.input_ids) :]
        expected = [token for token in whole.tolist() if token not in ends]
        assert answer.tolist() == other.tolist() == expected
        assert expected


@pytest.mark.parametrize("which", range(5))
def test_text_alone_or_any_mix_gives_every_trained_parameter_a_gradient(which: int, model, processor) -> None:
    choose_trainable(model, GEMMA4.rules, tuned=LEARNING)
    model(packed([samples(processor)[which]])).loss_sum.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (module_of(name, GEMMA4.rules) == "per_layer_table"), name


def test_a_sample_changes_nothing_of_the_others(model, stock, processor) -> None:
    """The leak of packs in transformers: 5 to 6 at logits of 6, with positions that start again and a mask of ones."""
    found = samples(processor)
    with torch.no_grad():
        lengths = [len(sample.input_ids) for sample in found]
        before = model.logits(packed(found)).split(lengths)
        for replaced in range(5):
            others = list(found)
            others[replaced] = processor.encode(MIXED[replaced - 1])
            after = model.logits(packed(others)).split([len(sample.input_ids) for sample in others])
            for number in set(range(5)) - {replaced}:
                torch.testing.assert_close(before[number], after[number], atol=1e-4, rtol=0)
        texts = [processor.encode(MIXED[number]) for number in (0, 4)]
        row = packed(texts)
        mask = torch.ones(1, len(row.input_ids), dtype=torch.long)
        inputs = {"input_ids": row.input_ids[None], "position_ids": row.position_ids[None]}
        leaking = stock(**inputs, attention_mask=mask).logits[0]
        assert (leaking - model.logits(row)).abs().max() > 3


def test_buffers_stay_exact_when_the_model_is_cast(folder: Path, model) -> None:
    exact = {name: buffer.clone() for name, buffer in model.named_buffers()}
    kinds = {name.rpartition(".")[2] for name in exact}
    assert kinds >= {"sliding_attention_inv_freq", "full_attention_inv_freq", "inv_freq", "layer_scalar", "input_min"}
    model.bfloat16()
    assert model.llm.model.embed_tokens.weight.dtype == torch.bfloat16
    for name, buffer in exact.items():
        assert torch.equal(model.get_buffer(name), buffer), name
    loaded = GEMMA4.load_model(folder, dtype=torch.bfloat16)
    for name, buffer in exact.items():
        held = loaded.get_buffer(name)
        assert torch.equal(held, buffer) or torch.equal(held, buffer.bfloat16()), name
        if "inv_" in name:
            assert torch.equal(held, buffer), name


def test_random_weights_have_the_configured_spread() -> None:
    model = GEMMA4.random_model(TINY, seed=0)
    for name in (
        "llm.model.layers.0.mlp.up_proj",
        "model.vision_tower.patch_embedder.input_proj",
        "model.embed_audio.embedding_projection",
    ):
        part = model.llm.model.layers[0].mlp.up_proj if name.startswith("llm") else model.get_submodule(name)
        assert part.weight.detach().std() == pytest.approx(0.08, rel=0.05), name
