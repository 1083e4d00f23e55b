"""How gradients are added up over packs and ranks, and the parameters updated: by us, or by DeepSpeed."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn

from train.config import OptimOptions
from train.engine.masters import MasterWeights
from train.engine.optimizer import make_adamw, make_optimizers
from train.modules.trainable import Group


class Engine(ABC):
    """The model as it is called in training, its optimizer, and what happens between a loss and an update.

    model: as the engine wrapped it.
    param_groups: of the optimizer, one for each of `groups`, in their order.
    """

    model: nn.Module
    param_groups: Sequence[dict[str, Any]]

    @abstractmethod
    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """Add the gradient of this rank's part of the step's loss.

        loss: the step's loss is the sum of all such parts, over the packs and the ranks.
        is_last: whether it is the rank's last of the step.
        """

    @abstractmethod
    def gradient_norm(self) -> Tensor:
        """The global L2 norm of the step's gradient before it was clipped, float32 (), the same on every rank."""

    @abstractmethod
    def update(self, *, is_finite: bool) -> None:
        """Update the parameters by the step's gradient; leave the step out where the gradient is not finite."""


class OwnEngine(Engine):
    """One process, or several that hold everything alike (DDP): fp32 gradients, one sum over the ranks in a step."""

    def __init__(
        self, accelerator: Accelerator, model: nn.Module, groups: list[Group], optim: OptimOptions, dtype: torch.dtype
    ):
        self.model = accelerator.prepare_model(model, evaluation_mode=True)  # on its device, with nothing around it
        _take_weights_of_the_first_rank(model)
        self.masters = MasterWeights((value for value in model.parameters() if value.requires_grad), dtype)
        self.optimizers = make_optimizers(groups, self.masters.__getitem__, optim)
        self.param_groups = self.optimizers.param_groups
        self.max_grad_norm = optim.max_grad_norm or float("inf")

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        if is_last:
            self.masters.reduce_in_next_backward()
        loss.backward()

    def gradient_norm(self) -> Tensor:
        self.masters.finish_reduction()
        return self.masters.clip(self.max_grad_norm)

    def update(self, *, is_finite: bool) -> None:
        if is_finite:
            self.optimizers.step()
            self.masters.write_back()
        self.masters.zero_gradients()


class DeepSpeedEngine(Engine):
    """ZeRO: DeepSpeed sums gradients, clips, and updates in the last backward of a step."""

    def __init__(self, accelerator: Accelerator, model: nn.Module, groups: list[Group], optim: OptimOptions):
        self.accelerator = accelerator
        self.model, self.optimizer = accelerator.prepare(model, make_adamw(groups, optim))
        self.param_groups = self.optimizer.param_groups

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        self.accelerator.gradient_state._set_sync_gradients(is_last)
        self.accelerator.backward(loss * self.accelerator.num_processes)  # it takes the mean over the ranks

    def gradient_norm(self) -> Tensor:
        return torch.tensor(float(cast(Any, self.model).get_global_grad_norm()), device=self.accelerator.device)

    def update(self, *, is_finite: bool) -> None:
        pass


def _take_weights_of_the_first_rank(model: nn.Module) -> None:
    if dist.is_initialized() and dist.get_world_size() > 1:
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                dist.broadcast(tensor, 0)
