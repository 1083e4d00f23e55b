"""What is learned: the weight of a pack in its step, and its loss."""

from typing import NamedTuple, Protocol

from torch import Tensor, nn

from train.schema import Batch


class PackLoss(NamedTuple):
    """The loss of a pack."""

    total: Tensor
    """float32 scalar: the weighted sum, with its graph"""
    each: Tensor
    """float32 (M,): the loss of each target of the batch, unweighted, without a graph"""


class Objective(Protocol):
    """The step's loss is the sum of its packs' losses divided by the sum of their weights, over all ranks."""

    def weight(self, batch: Batch) -> float:
        """What the pack counts."""
        ...

    def loss(self, model: nn.Module, batch: Batch) -> PackLoss:
        """The pack's loss; `model` may be wrapped by an engine, and is called once."""
        ...


class NextToken:
    """Cross-entropy of the supervised tokens, each with its turn's weight."""

    def weight(self, batch: Batch) -> float:
        """The sum of the targets' weights."""
        return float(batch.loss_weights.sum())

    def loss(self, model: nn.Module, batch: Batch) -> PackLoss:
        """The sum over the targets of weight · cross-entropy, which is `PackedModel.packed_loss`."""
        output = model(batch=batch)
        return PackLoss(output.loss_sum, output.token_losses)
