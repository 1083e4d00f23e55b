"""The head and its cross-entropy: in chunks as `modules.loss` does it, against full logits.

python benchmarks/loss.py
"""

import argparse
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measure import Cost, finish, measured, print_table, use_one_core
from torch import Tensor

from train.modules.loss import CHUNK, token_losses


@dataclass(frozen=True)
class Sizes:
    """Tokens, width of the hidden states, words, and tokens of a chunk."""

    tokens: int
    hidden: int
    vocabulary: int
    chunk: int


@dataclass(frozen=True)
class Outcome:
    """What one way gives, and what it cost; memory is beyond the weight and its gradient."""

    loss: float
    hidden_gradient: Tensor
    weight_gradient: Tensor
    cost: Cost


def run(sizes: Sizes, chunked: bool) -> Outcome:
    """Forward and backward of the mean loss; in a process of its own, so that nothing is left from before."""
    use_one_core()
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(sizes.tokens, sizes.hidden, generator=random, requires_grad=True)
    weight = torch.randn(sizes.vocabulary, sizes.hidden, generator=random).mul_(sizes.hidden**-0.5).requires_grad_()
    targets = torch.randint(sizes.vocabulary, (sizes.tokens,), generator=random)

    def forward_backward() -> Tensor:
        if chunked:
            loss = token_losses(hidden, weight, targets, chunk=sizes.chunk).mean()
        else:
            loss = F.cross_entropy(F.linear(hidden, weight).float(), targets)
        loss.backward()
        return loss.detach()

    loss, cost = measured(forward_backward)
    assert hidden.grad is not None
    assert weight.grad is not None
    beyond = cost.peak_bytes - weight.grad.nbytes
    return Outcome(float(loss), hidden.grad, weight.grad, Cost(cost.seconds, beyond))


def figures_of(sizes: Sizes) -> dict[str, Any]:
    """Both ways, their ratios, and that they agree."""
    outcomes = []
    for chunked in (True, False):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            outcomes.append(process.submit(run, sizes, chunked).result())
    chunked_way, full_way = outcomes
    torch.testing.assert_close(chunked_way.loss, full_way.loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(chunked_way.hidden_gradient, full_way.hidden_gradient, rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(chunked_way.weight_gradient, full_way.weight_gradient, rtol=1e-4, atol=1e-8)
    rows = [
        {"way": name, "seconds": way.cost.seconds, "peak_mib": way.cost.peak_bytes / 2**20, "loss": way.loss}
        for name, way in (("chunked", chunked_way), ("full logits", full_way))
    ]
    return {
        "tokens": sizes.tokens,
        "hidden": sizes.hidden,
        "vocabulary": sizes.vocabulary,
        "chunk": sizes.chunk,
        "ways": rows,
        "time_ratio": chunked_way.cost.seconds / full_way.cost.seconds,
        "memory_ratio": chunked_way.cost.peak_bytes / full_way.cost.peak_bytes,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, and write it as JSON if asked to."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=("tiny", "cpu"), default="cpu")
    parser.add_argument("--chunk", type=int, default=CHUNK, help="tokens whose logits exist at one time")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    chosen = parser.parse_args(arguments)
    tokens, hidden, vocabulary = (4096, 512, 122_880) if chosen.size == "cpu" else (256, 32, 1024)
    figures = figures_of(Sizes(tokens, hidden, vocabulary, chosen.chunk))
    print_table(figures["ways"])
    print(f"chunked / full: time {figures['time_ratio']:.3f}, memory {figures['memory_ratio']:.3f}")
    finish(figures, chosen.json)


if __name__ == "__main__":
    main()
