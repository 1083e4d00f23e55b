import math

import pytest
import torch
from torch import nn

from tests.builders import randomize
from train.families.megrezo.resampler import Resampler, position_embedding

CPU = torch.device("cpu")


@pytest.fixture
def resampler() -> Resampler:
    torch.manual_seed(0)
    resampler = Resampler(num_queries=3, embed_dim=256, kv_dim=24)
    randomize(resampler)
    return resampler


def test_position_embedding_by_hand():
    table = position_embedding(torch.tensor([(2, 3)]), 8, CPU)
    # row 1, column 2: the last patch. Width first, each half sines then cosines at 1 and 1/100.
    expected = [math.sin(2), math.sin(0.02), math.cos(2), math.cos(0.02)]
    expected += [math.sin(1), math.sin(0.01), math.cos(1), math.cos(0.01)]
    torch.testing.assert_close(table[5], torch.tensor(expected))
    assert table[0].tolist() == [0, 0, 1, 1, 0, 0, 1, 1]


def test_positions_start_again_with_each_slice():
    both = position_embedding(torch.tensor([(2, 3), (1, 90)]), 16, CPU)
    assert torch.equal(both[:6], position_embedding(torch.tensor([(2, 3)]), 16, CPU))
    assert torch.equal(both[6:], position_embedding(torch.tensor([(1, 90)]), 16, CPU))


def test_equals_multihead_attention_slice_by_slice(resampler):
    reference = nn.MultiheadAttention(256, num_heads=2)
    reference.load_state_dict(resampler.attn.state_dict())
    sizes = [(2, 3), (1, 90), (3, 2)]
    features = torch.randn(102, 24)
    expected = []
    for size, piece in zip(sizes, features.split([6, 90, 6]), strict=True):
        values = resampler.ln_kv(piece @ resampler.kv_proj.weight.T)
        keys = values + position_embedding(torch.tensor([size]), 256, CPU)
        out, _ = reference(resampler.ln_q(resampler.query), keys, values)
        expected.append(resampler.ln_post(out) @ resampler.proj)
    out = resampler(features, torch.tensor(sizes))
    assert out.shape == (9, 256)
    torch.testing.assert_close(out, torch.cat(expected), atol=1e-4, rtol=1e-4)


def test_keys_are_the_published_ones(resampler):
    expected = {"query", "proj", "kv_proj.weight", "attn.in_proj_weight", "attn.in_proj_bias"}
    for name in ("attn.out_proj", "ln_q", "ln_kv", "ln_post"):
        expected |= {f"{name}.weight", f"{name}.bias"}
    assert set(resampler.state_dict()) == expected
