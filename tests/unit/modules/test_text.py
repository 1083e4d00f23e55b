"""Text models: packs equal the stock models one by one; MiniCPM's scales act where they should."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from tests.builders import make_batch, make_sample, randomize, tiny_config
from train.families.minicpm.model import MiniCPMConfig, MiniCPMForCausalLM
from train.modules.text import LlamaConfig, LlamaForCausalLM
from train.schema import Batch, Sample

SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}


def llama() -> LlamaForCausalLM:
    return made(LlamaForCausalLM(transformers.LlamaConfig(**SIZES)))


def minicpm() -> MiniCPMForCausalLM:
    return made(MiniCPMForCausalLM(MiniCPMConfig(**SIZES, dim_model_base=16)))


def made(model):
    torch.manual_seed(0)
    randomize(model)
    return model.eval()


@pytest.fixture
def samples() -> list[Sample]:
    return [make_sample(tiny_config(), text=text, learned=learned, seed=text) for text, learned in ((9, 4), (13, 6))]


@pytest.fixture
def batch(samples) -> Batch:
    return make_batch(samples)


@pytest.mark.parametrize("make", [llama, minicpm])
def test_a_pack_gives_the_plain_models_loss_and_gradients(make, samples, batch):
    packed, plain = make(), make()
    packed(batch=batch).loss_sum.backward()
    total = torch.zeros(())
    for sample in samples:
        logits = plain(input_ids=sample.input_ids[None]).logits[0, :-1]
        losses = F.cross_entropy(logits, sample.labels[1:], reduction="none", ignore_index=-100)
        total = total + (losses * sample.loss_weights[1:]).sum()
    total.backward()
    torch.testing.assert_close(packed(batch=batch).loss_sum, total, atol=1e-4, rtol=1e-5)
    for (name, mine), (_, its) in zip(packed.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(mine.grad, its.grad, atol=1e-4, rtol=1e-4, msg=name)


@pytest.mark.parametrize("make", [llama, minicpm])
@torch.no_grad()
def test_packed_answers_are_the_plain_models(make, samples, batch):
    model = make()
    answers = model.generate(batch, max_new_tokens=6, do_sample=False, eos_token_id=[])
    for answer, sample in zip(answers, samples, strict=True):
        whole = sample.input_ids
        for _ in range(6):
            whole = torch.cat([whole, model(input_ids=whole[None]).logits[0, -1].argmax()[None]])
        assert answer.equal(whole[len(sample.input_ids) :])
        plain = model.generate(sample.input_ids[None], max_new_tokens=6, do_sample=False, eos_token_id=[])
        assert plain[0].equal(whole)


def test_a_plain_llama_is_transformers_own(tmp_path):
    """Keys, configuration and class name on disk are the stock ones."""
    model = llama()
    model.save_pretrained(tmp_path)
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(stock) is transformers.LlamaForCausalLM
    assert stock.config.architectures == ["LlamaForCausalLM"]
    ids = torch.arange(3, 20)[None]
    torch.testing.assert_close(stock(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "rope",
    [
        {"type": "linear", "factor": 2.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 128,
        },
    ],
)
@torch.no_grad()
def test_scaled_rotary_embeddings_are_transformers_own(rope, samples, batch):
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, rope_scaling=rope, rope_theta=5e5)
    packed, plain = made(LlamaForCausalLM(config)), llama()
    stock = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, rope_scaling=rope, rope_theta=5e5)).eval()
    for model in (stock, plain):
        model.load_state_dict(packed.state_dict())
    expected = torch.cat([stock(input_ids=sample.input_ids[None]).logits[0] for sample in samples])
    torch.testing.assert_close(packed.logits(batch), expected, atol=1e-4, rtol=1e-4)
    assert (plain.logits(batch) - expected).abs().max() > 1e-2


def rms(x: Tensor) -> Tensor:
    return x / (x.pow(2).mean() + 1e-5).sqrt()


def test_minicpms_scales_by_hand():
    """A single token attends to itself alone, so its attention is its value: no positions, no softmax."""
    model = minicpm()
    weights = dict(model.named_parameters())
    assert "lm_head.weight" not in weights
    embedding = weights["model.embed_tokens.weight"]
    x = 12 * embedding[5]
    for layer in ("model.layers.0.", "model.layers.1."):
        h = weights[f"{layer}input_layernorm.weight"] * rms(x)
        h = weights[f"{layer}self_attn.o_proj.weight"] @ weights[f"{layer}self_attn.v_proj.weight"] @ h
        x = x + 1.4 / 2**0.5 * h
        h = weights[f"{layer}post_attention_layernorm.weight"] * rms(x)
        gate, up = (weights[f"{layer}mlp.{name}_proj.weight"] @ h for name in ("gate", "up"))
        x = x + 1.4 / 2**0.5 * (weights[f"{layer}mlp.down_proj.weight"] @ (F.silu(gate) * up))
    expected = embedding @ (weights["model.norm.weight"] * rms(x)) / (64 / 16)
    torch.testing.assert_close(model(input_ids=torch.tensor([[5]])).logits[0, 0], expected, atol=1e-4, rtol=1e-4)
    sample = make_sample(tiny_config(), text=1, learned=0)
    sample.input_ids[0] = 5
    torch.testing.assert_close(model.logits(make_batch([sample]))[0], expected, atol=1e-4, rtol=1e-4)


def test_attention_is_scaled_by_the_width_of_a_head():
    assert minicpm().model.layers[0].self_attn.scaling == 16**-0.5


def test_the_default_is_minicpm_2b():
    with torch.device("meta"):
        model = MiniCPMForCausalLM(MiniCPMConfig())
    layer = 4 * 2304 * 2304 + 3 * 2304 * 5760 + 2 * 2304
    assert sum(parameter.numel() for parameter in model.parameters()) == 122_753 * 2304 + 40 * layer + 2304
    assert model.config.logits_scaling == 9
    assert model.config.residual_multiplier == pytest.approx(1.4 / 40**0.5)
    saved = model.config.to_dict()
    assert (saved["model_type"], saved["scale_emb"], saved["scale_depth"], saved["dim_model_base"]) == (
        "minicpm",
        12,
        1.4,
        256,
    )
    assert not saved.keys() & {"embedding_multiplier", "residual_multiplier", "logits_scaling", "attention_multiplier"}


def test_megrez_3b_instruct_has_the_published_size():
    config = transformers.LlamaConfig(
        vocab_size=122_880,
        hidden_size=2560,
        intermediate_size=7168,
        num_hidden_layers=32,
        num_attention_heads=40,
        num_key_value_heads=10,
        rope_theta=5e6,
        max_position_embeddings=32_768,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e9, 2) == 2.92
