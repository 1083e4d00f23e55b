import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import cross_entropy, linear
from torch.utils._python_dispatch import TorchDispatchMode

from train.modules.loss import chunk_of, token_losses
from train.preflight.memory import LiveBytes


def inputs(tokens: int = 7, hidden_grad: bool = True, weight_grad: bool = True):
    torch.manual_seed(0)
    hidden = torch.randn(tokens, 16, requires_grad=hidden_grad)
    weight = torch.randn(40, 16, requires_grad=weight_grad)
    return hidden, weight, torch.randint(0, 40, (tokens,)), torch.rand(tokens)


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_equals_cross_entropy_with_its_gradients(chunk):
    hidden, weight, targets, weights = inputs()
    expected = cross_entropy(linear(hidden, weight), targets, reduction="none")
    expected_grads = torch.autograd.grad((expected * weights).sum(), (hidden, weight))
    losses = token_losses(hidden, weight, targets, chunk=chunk)
    grads = torch.autograd.grad((losses * weights).sum(), (hidden, weight))
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(grads, expected_grads)


@pytest.mark.parametrize("chunk", [1, 3, 100])
@pytest.mark.parametrize("cap", [2.0, 30.0])
def test_a_cap_bends_the_logits_and_their_gradients(chunk, cap):
    hidden, weight, targets, weights = inputs()
    logits = linear(hidden, weight)
    assert logits.abs().max() > 4
    expected = cross_entropy(cap * torch.tanh(logits / cap), targets, reduction="none")
    expected_grads = torch.autograd.grad((expected * weights).sum(), (hidden, weight))
    losses = token_losses(hidden, weight, targets, chunk=chunk, cap=cap)
    grads = torch.autograd.grad((losses * weights).sum(), (hidden, weight))
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(grads, expected_grads)


@pytest.mark.parametrize(("words", "tokens"), [(1000, 512), (122_880, 512), (262_144, 240)])
def test_a_large_vocabulary_takes_fewer_tokens_at_a_time(words, tokens):
    assert chunk_of(words) == tokens


def test_a_uniform_head_costs_the_logarithm_of_its_words():
    losses = token_losses(torch.zeros(2, 4), torch.ones(8, 4), torch.tensor([0, 7]))
    torch.testing.assert_close(losses, torch.tensor([2.0794415, 2.0794415]))


@pytest.mark.parametrize(("hidden_grad", "weight_grad"), [(True, False), (False, True)])
def test_what_is_frozen_gets_no_gradient(hidden_grad, weight_grad):
    hidden, weight, targets, _ = inputs(hidden_grad=hidden_grad, weight_grad=weight_grad)
    token_losses(hidden, weight, targets).sum().backward()
    assert (hidden.grad is not None) == hidden_grad
    assert (weight.grad is not None) == weight_grad


def test_no_tokens_give_zero_gradients():
    hidden, weight, targets, _ = inputs(tokens=0)
    token_losses(hidden, weight, targets).sum().backward()
    assert hidden.grad.shape == (0, 16)
    assert torch.equal(weight.grad, torch.zeros(40, 16))


def test_bfloat16_sums_in_float32():
    hidden, weight, targets, _ = inputs(tokens=64)
    exact = cross_entropy(linear(hidden, weight), targets, reduction="none")
    half_hidden, half_weight = (x.detach().bfloat16().requires_grad_() for x in (hidden, weight))
    losses = token_losses(half_hidden, half_weight, targets, chunk=8)
    losses.sum().backward()
    assert losses.dtype == torch.float32
    assert half_weight.grad.dtype == torch.bfloat16
    torch.testing.assert_close(losses, exact, atol=0.1, rtol=0.02)
    (expected,) = torch.autograd.grad(exact.sum(), weight)
    assert (half_weight.grad - expected).norm() / expected.norm() < 0.02


def test_logits_are_never_held_all_at_once():
    hidden, weight, targets, _ = inputs(tokens=50)
    rows_of_logits = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.shape[1:] == (40,) and len(out) != 16:  # 16: the head itself
                rows_of_logits.add(len(out))
            return out

    with Watch():
        token_losses(hidden, weight, targets, chunk=5).sum().backward()
    assert rows_of_logits == {5}


def test_a_large_vocabulary_takes_a_tenth_of_the_memory_of_full_logits():
    """262,144 words and 4,096 tokens with a cap, measured on tensors without values."""
    peaks = []
    with FakeTensorMode():
        weight, targets = torch.empty(262_144, 64), torch.empty(4096, dtype=torch.long)
        for is_full in (False, True):
            hidden = torch.empty(4096, 64, requires_grad=True)
            with LiveBytes() as live:
                if is_full:
                    losses = cross_entropy(30 * torch.tanh(linear(hidden, weight) / 30), targets, reduction="none")
                else:
                    losses = token_losses(hidden, weight, targets, cap=30.0)
                losses.sum().backward()
            peaks.append(live.peak)
    assert peaks[1] > 4 * 2**30  # one copy of the logits
    assert peaks[0] <= peaks[1] / 10


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cap", [None, 10.0])
def test_liger_gives_the_same_losses_and_gradients(cap, dtype):
    pytest.importorskip("liger_kernel")
    torch.manual_seed(0)
    hidden = torch.randn(300, 64, device="cuda", dtype=dtype, requires_grad=True)
    weight = torch.randn(1000, 64, device="cuda", dtype=dtype, requires_grad=True)
    targets, weights = torch.randint(0, 1000, (300,), device="cuda"), torch.rand(300, device="cuda")
    results = []
    for liger in (False, True):
        losses = token_losses(hidden, weight, targets, chunk=128, cap=cap, liger=liger)
        results.append((losses.detach(), *torch.autograd.grad((losses * weights).sum(), (hidden, weight))))
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).norm() / ours.norm() < (1e-4 if dtype == torch.float32 else 2e-2)
