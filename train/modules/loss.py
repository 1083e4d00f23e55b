"""Cross-entropy of supervised tokens, without ever holding their logits all at once."""

import torch
import torch.nn.functional as F
from torch import Tensor

from train.errors import OmniTuneError

CHUNK = 512
"""Most tokens whose logits exist at one time: 0.25 GB of float32 for 122880 words."""

LOGITS = CHUNK * 122_880
"""Logits that exist at one time, where a larger vocabulary than that would make them more."""


def chunk_of(words: int) -> int:
    """Tokens whose logits exist at one time, for a head of so many words."""
    return max(1, min(CHUNK, LOGITS // words))


def capped(logits: Tensor, cap: float | None) -> Tensor:
    """The logits bent by tanh so that they stay within ±`cap`; None leaves them as they are."""
    return logits if cap is None else torch.tanh(logits / cap) * cap


def token_losses(
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    *,
    chunk: int | None = None,
    cap: float | None = None,
    liger: bool = False,
) -> Tensor:
    """Cross-entropy of each token, in nats.

    The logits are made `chunk` tokens at a time, in float32 after the product, and again in the backward.
    What is frozen, the head or the hidden states, costs no gradient. With `liger` its fused kernel does the
    same, in chunks of its own choice (CUDA only; the package liger-kernel).

    Args:
        hidden: (M, D); M may be 0.
        head_weight: (V, D)
        targets: int64 (M,)
        chunk: None takes what `chunk_of` says.
        cap: see `capped`; the gradient is that of the bent logits.

    Returns:
        float32 (M,)
    """
    if liger and len(targets):
        try:  # transformers looks for all other imports before it loads a folder that carries this code
            from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy
        except ImportError as error:
            raise OmniTuneError(f"Liger's kernel cannot be imported ({error}); pip install liger-kernel") from None

        return liger_fused_linear_cross_entropy(
            hidden, head_weight, targets, reduction="none", accum_dtype=torch.float32, softcap=cap
        )
    return _TokenLosses.apply(hidden, head_weight, targets, chunk or chunk_of(len(head_weight)), cap)


class _TokenLosses(torch.autograd.Function):
    """The products run in the weight's dtype; sums over words and over chunks run in float32."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int, cap: float | None) -> Tensor:
        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        log_sums = torch.empty_like(losses)
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            logits = _logits(hidden[rows], weight, cap)
            log_sums[rows] = logits.logsumexp(dim=-1)
            losses[rows] = log_sums[rows] - logits.gather(1, targets[rows, None]).squeeze(1)
        ctx.save_for_backward(hidden, weight, targets, log_sums)
        ctx.chunk, ctx.cap = chunk, cap
        return losses

    @staticmethod
    def backward(ctx, grad_losses: Tensor):
        hidden, weight, targets, log_sums = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for start in range(0, len(hidden), ctx.chunk):
            rows = slice(start, start + ctx.chunk)
            grad = _logit_gradient(hidden[rows], weight, targets[rows], log_sums[rows], ctx.cap)
            grad = grad.mul_(grad_losses[rows, None]).to(weight.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = grad @ weight
            if grad_weight is not None:
                _add_product(grad_weight, grad.T, hidden[rows].to(weight.dtype))
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None


def _logits(hidden: Tensor, weight: Tensor, cap: float | None) -> Tensor:
    logits = F.linear(hidden.to(weight.dtype), weight).float()
    return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)


def _logit_gradient(hidden: Tensor, weight: Tensor, targets: Tensor, log_sums: Tensor, cap: float | None) -> Tensor:
    """d loss / d logits, before they are bent: softmax − one-hot, and less where tanh is flat."""
    logits = _logits(hidden, weight, cap)
    slope = None if cap is None else (logits / cap).square_().neg_().add_(1)
    grad = logits.sub_(log_sums[:, None]).exp_()
    grad[torch.arange(len(grad), device=grad.device), targets] -= 1.0
    return grad if slope is None else grad.mul_(slope)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, without a copy of the product where the dtypes allow it."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b
