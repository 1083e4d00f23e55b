import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from train.modules.attention import Segments, _has_varlen_kernel, _opaque_attention, llm_attention, varlen_attention

CPU = torch.device("cpu")


def random_heads(tokens: int, heads: int, dim: int = 8) -> torch.Tensor:
    return torch.randn(tokens, heads, dim)


def test_segments_know_their_lengths_on_both_sides():
    segments = Segments.of([3, 1, 2], CPU)
    assert segments.cu_seqlens.tolist() == [0, 3, 4, 6]
    assert segments.cu_seqlens.dtype == torch.int32
    assert segments.longest == 3
    assert Segments.of_cu_seqlens(segments.cu_seqlens, CPU).lengths == (3, 1, 2)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_equals_dense_attention_under_a_block_mask(causal, kv_heads):
    torch.manual_seed(0)
    lengths = [5, 3, 5, 1, 3]
    q, k, v = random_heads(17, 4), random_heads(17, kv_heads), random_heads(17, kv_heads)
    sample = torch.arange(5).repeat_interleave(torch.tensor(lengths))
    mask = sample[:, None] == sample
    if causal:
        mask &= torch.arange(17)[:, None] >= torch.arange(17)
    dense = scaled_dot_product_attention(
        *(x.transpose(0, 1) for x in (q, k, v)), attn_mask=mask, enable_gqa=True, scale=0.3
    ).transpose(0, 1)
    out = varlen_attention(q, k, v, Segments.of(lengths, CPU), causal=causal, scale=0.3)
    torch.testing.assert_close(out, dense)


@pytest.mark.parametrize("window", [1, 2, 3, 5, 16, 40])
def test_a_window_is_what_a_dense_mask_makes_of_it(window):
    """Segments shorter and longer than the window, compiled and not, with their gradients."""
    torch.manual_seed(0)
    lengths = [5, 3, 16, 1, 17]
    q, k, v = (random_heads(42, 4).requires_grad_() for _ in range(3))
    sample, behind = torch.arange(5).repeat_interleave(torch.tensor(lengths)), torch.arange(42)
    behind = behind[:, None] - behind
    mask = (sample[:, None] == sample) & (behind >= 0) & (behind < window)
    dense = scaled_dot_product_attention(*(x.transpose(0, 1) for x in (q, k, v)), attn_mask=mask).transpose(0, 1)
    segments = Segments.of(lengths, CPU)
    weights = torch.randn_like(dense)
    expected = torch.autograd.grad(dense, (q, k, v), weights)
    ends = segments.cu_seqlens
    for out in (
        varlen_attention(q, k, v, segments, causal=True, window=window),
        _opaque_attention(q, k, v, ends, ends, True, window, None)[0],
    ):
        torch.testing.assert_close(out, dense)
        torch.testing.assert_close(torch.autograd.grad(out, (q, k, v), weights), expected)


def test_a_layer_says_whether_it_is_causal_and_how_far_it_sees():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 4, 9, 8) for _ in range(3))
    segments = Segments.of([9], CPU)
    layer = nn.Module()
    for causal, window in ((False, None), (True, None), (True, 4)):
        layer.is_causal = causal
        out, _ = llm_attention(layer, q, k, v, None, segments=segments, sliding_window=window)
        rows = (x[0].transpose(0, 1) for x in (q, k, v))
        assert torch.equal(out[0], varlen_attention(*rows, segments, causal=causal, window=window))


def test_queries_and_keys_may_differ_in_length():
    torch.manual_seed(0)
    q, k, v = random_heads(4, 2), random_heads(9, 2), random_heads(9, 2)
    out = varlen_attention(q, k, v, Segments.of([2, 2], CPU), Segments.of([6, 3], CPU))
    second = scaled_dot_product_attention(*(x.transpose(0, 1) for x in (q[2:], k[6:], v[6:]))).transpose(0, 1)
    torch.testing.assert_close(out[2:], second)


@pytest.mark.parametrize("length", [1, 7, 40, 200])
def test_a_segment_alone_gives_the_same_bits(length):
    torch.manual_seed(0)
    lengths = [3, length, length, 90, length]
    total = sum(lengths)
    q, k, v = random_heads(total, 4), random_heads(total, 2), random_heads(total, 2)
    packed = varlen_attention(q, k, v, Segments.of(lengths, CPU), causal=True).split(lengths)
    for n in (1, 2, 4):
        own = [x.split(lengths)[n] for x in (q, k, v)]
        assert torch.equal(packed[n], varlen_attention(*own, Segments.of([length], CPU), causal=True))


@pytest.mark.parametrize("causal", [False, True])
def test_the_operator_of_compiled_layers_gives_the_same_with_its_gradients(causal):
    torch.manual_seed(0)
    lengths_q, lengths_k = [5, 3, 5, 1, 3], [5, 3, 5, 1, 3] if causal else [2, 9, 2, 4, 1]
    segments = Segments.of(lengths_q, CPU), Segments.of(lengths_k, CPU)
    inputs = [random_heads(sum(n), 4).requires_grad_() for n in (lengths_q, lengths_k, lengths_k)]
    expected = varlen_attention(*inputs, *segments, causal=causal, scale=0.3)
    found, _ = _opaque_attention(*inputs, *(s.cu_seqlens for s in segments), causal, None, 0.3)
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(expected)
    pairs = (torch.autograd.grad(out, inputs, weights) for out in (found, expected))
    torch.testing.assert_close(*pairs)
    torch.library.opcheck(_opaque_attention, (*inputs, *(s.cu_seqlens for s in segments), causal, None, 0.3))


def test_without_segments_it_is_sdpa_with_a_mask():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, 6, 8) for _ in range(3))
    mask = torch.ones(2, 1, 6, 6, dtype=torch.bool).tril()
    mask[0, :, :, 0] = False
    mask[0, :, 0, 0] = True
    out, _ = llm_attention(nn.Module(), q, k, v, mask, scaling=0.5)
    expected = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.5).transpose(1, 2)
    assert torch.equal(out, expected)


@pytest.mark.parametrize(("capability", "has"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_older_gpus_are_spared_the_kernel_that_crashes_there(
    capability: tuple[int, int], has: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    _has_varlen_kernel.cache_clear()
    assert _has_varlen_kernel(torch.device("cuda")) is has
    _has_varlen_kernel.cache_clear()
