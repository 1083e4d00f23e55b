import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, masking_utils

from train.modules.attention import ATTENTION_NAME, Segments
from train.modules.llm import build_llm, packed_hidden_states

LENGTHS = [5, 9, 1, 5]


def config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-5,
    )


@pytest.fixture
def llm() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return build_llm(config()).eval()


def packed(llm: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    hidden = packed_hidden_states(
        llm, llm.get_input_embeddings()(ids), positions, Segments.of(LENGTHS, torch.device("cpu"))
    )
    return llm.lm_head(hidden)


def test_a_pack_equals_transformers_one_by_one(llm):
    stock = LlamaForCausalLM(config()).eval()
    stock.load_state_dict(llm.state_dict())
    ids = torch.randint(0, 50, (sum(LENGTHS),))
    alone = torch.cat([stock(sample[None]).logits[0] for sample in ids.split(LENGTHS)])
    torch.testing.assert_close(packed(llm, ids), alone, atol=1e-5, rtol=1e-5)


def test_no_mask_is_built_for_a_pack(llm, monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("a mask was built")

    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", forbidden)
    monkeypatch.setitem(masking_utils.AttentionMaskInterface._global_mapping, ATTENTION_NAME, forbidden)
    packed(llm, torch.randint(0, 50, (sum(LENGTHS),)))


def test_padding_and_cache_are_those_of_sdpa(llm):
    stock = LlamaForCausalLM(config()).eval()
    stock.load_state_dict(llm.state_dict())
    ids = torch.randint(0, 50, (2, 6))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    options = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(llm.generate(ids, **options), stock.generate(ids, **options))


def test_checkpointing_changes_no_gradient(llm):
    ids = torch.randint(0, 50, (sum(LENGTHS),))
    llm.train()
    expected = torch.autograd.grad(packed(llm, ids).square().sum(), list(llm.parameters()))
    llm.gradient_checkpointing_enable({"use_reentrant": False})
    grads = torch.autograd.grad(packed(llm, ids).square().sum(), list(llm.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(expected, grads, strict=True))


def test_rotary_frequencies_stay_float32(llm):
    exact = llm.model.rotary_emb.inv_freq.clone()
    llm.bfloat16()
    assert llm.model.norm.weight.dtype == torch.bfloat16
    assert llm.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(llm.model.rotary_emb.inv_freq, exact)
