"""The optimizers over the module groups, and the learning rate as a pure function of the step."""

from collections.abc import Callable, Collection, Iterable, Sequence
from math import cos, pi
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from train.config import OptimizerName, OptimOptions, Schedule
from train.export.checkpoint_reader import MOMENTS
from train.modules.trainable import Group

_NOT_SAVED = ("step", "qmap1", "qmap2")
"""State that is no parameter's own: the count of updates, and tables of 8-bit codes."""


def make_adamw(
    groups: Iterable[Group],
    optim: OptimOptions,
    master_of: Callable[[nn.Parameter], nn.Parameter] = lambda parameter: parameter,
) -> torch.optim.AdamW:
    """AdamW with one parameter group for each group, over the parameters' master weights.

    Where DeepSpeed offloads, accelerate makes its CPU Adam of this one; handed a DeepSpeedCPUAdam, it would
    rebuild that without decoupled weight decay.
    """
    beta1, beta2 = optim.betas
    settings = [_settings(group, master_of) for group in groups]
    return torch.optim.AdamW(settings, betas=(beta1, beta2), eps=optim.eps, fused=True)


class Optimizers:
    """torch's optimizers, each over some of the groups, as one.

    param_groups: one for each of the groups, in their order.
    """

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer], param_groups: Sequence[dict[str, Any]]):
        self.optimizers, self.param_groups = optimizers, param_groups

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def state_of(self, master: nn.Parameter) -> dict[str, Tensor]:
        """What an optimizer keeps of a parameter, by its name for it; nothing before the first update."""
        for optimizer in self.optimizers:
            if master in optimizer.state:
                return {name: value for name, value in optimizer.state[master].items() if name not in _NOT_SAVED}
        return {}

    def prepare_state(self, updates: int) -> None:
        """Make room for the state after a number of updates, in optimizers that made none."""
        for optimizer in self.optimizers:
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            if isinstance(optimizer, torch.optim.AdamW):
                prepare_moments(optimizer, parameters, updates)
            elif isinstance(optimizer, torch.optim.Muon):
                for parameter in parameters:
                    optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
            else:
                _prepare_8_bit_moments(optimizer, updates)


def make_optimizers(
    groups: Sequence[Group], master_of: Callable[[nn.Parameter], nn.Parameter], optim: OptimOptions
) -> Optimizers:
    """The optimizers that `optim.name` asks for, over the parameters' master weights."""
    if optim.name is OptimizerName.adamw_8bit:
        from bitsandbytes.optim import AdamW8bit

        settings = [_settings(group, master_of) for group in groups]
        beta1, beta2 = optim.betas
        optimizer = AdamW8bit(settings, betas=(beta1, beta2), eps=optim.eps)
        return Optimizers([optimizer], optimizer.param_groups)
    by_muon = [group for group in groups if group.by_muon]
    rest = [group for group in groups if not group.by_muon]
    optimizers: list[torch.optim.Optimizer] = []
    if by_muon:
        settings = [_settings(group, master_of) for group in by_muon]
        # scaled so that a rate and a decay that suit AdamW suit it
        optimizers.append(torch.optim.Muon(settings, adjust_lr_fn="match_rms_adamw"))
    if rest:
        optimizers.append(make_adamw(rest, optim, master_of))
    made = [param_group for optimizer in optimizers for param_group in optimizer.param_groups]
    by_group = dict(zip(map(id, by_muon + rest), made, strict=True))
    return Optimizers(optimizers, [by_group[id(group)] for group in groups])


def matrices(model: nn.Module) -> set[nn.Parameter]:
    """What Muon is for: the weights of linear layers; the head, which chooses among words as embeddings do, is none."""
    head = cast(PreTrainedModel, model).get_output_embeddings()
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear) and layer is not head]
    return {layer.get_parameter("weight") for layer in layers}


def _settings(group: Group, master_of: Callable[[nn.Parameter], nn.Parameter]) -> dict[str, Any]:
    return {"params": list(map(master_of, group.parameters)), "lr": group.lr, "weight_decay": group.weight_decay}


def prepare_moments(optimizer: Any, parameters: Iterable[Tensor], updates: int) -> None:
    """Give parameters that were never updated the state of Adam, with moments to be filled in."""
    in_torch = isinstance(optimizer, torch.optim.AdamW)  # DeepSpeed's CPU Adam counts in a plain number
    for parameter in parameters:
        state = optimizer.state[parameter]
        state["step"] = torch.tensor(float(updates), device=parameter.device) if in_torch else updates
        for kind in MOMENTS:
            state[kind] = torch.zeros_like(parameter)
    if not in_torch:
        _advance_cpu_adam(optimizer, updates)


def _advance_cpu_adam(optimizer: Any, updates: int) -> None:
    """Bring the powers of the betas to where that many updates left them.

    DeepSpeed's CPU Adam multiplies them step by step; started at a later step it would compute them anew, which
    rounds differently.
    """
    nothing = [torch.zeros(1) for _ in range(4)]
    (beta1, beta2), eps = optimizer.param_groups[0]["betas"], optimizer.param_groups[0]["eps"]
    for step in range(1, updates + 1):
        optimizer.ds_opt_adam.adam_update(optimizer.opt_id, step, 0.0, beta1, beta2, eps, 0.0, True, *nothing)


def _prepare_8_bit_moments(optimizer: Any, updates: int) -> None:
    """The same for bitsandbytes: codes and the scales of their blocks."""
    for number, group in enumerate(optimizer.param_groups):
        for place, parameter in enumerate(group["params"]):
            optimizer.init_state(group, parameter, number, place)
            optimizer.state[parameter]["step"] = updates


class LearningRates:
    """Sets each group's rate before a step; nothing to save, since the step says it all."""

    def __init__(self, groups: list[Group], optim: OptimOptions, total_steps: int):
        self.groups, self.optim, self.total_steps = groups, optim, total_steps
        self.warmup_steps = round(optim.warmup_ratio * total_steps)

    def factor(self, step: int) -> float:
        """Share of the peak rate at a step, counted from 0."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        shape = {
            Schedule.cosine: (1 + cos(pi * progress)) / 2,
            Schedule.linear: 1 - progress,
            Schedule.constant: 1.0,
        }[self.optim.schedule]
        return self.optim.min_lr_ratio + (1 - self.optim.min_lr_ratio) * shape

    def set(self, param_groups: Sequence[dict[str, Any]], step: int, idle: Collection[str] = ()) -> dict[str, float]:
        """Put the step's rates into the optimizer's groups; returns them by label, for the metrics.

        idle: modules that no sample of the step uses. Their rate is 0, so that neither weight decay nor old
        moments move them; their moments fade as in any step whose gradient is zero.
        """
        factor = self.factor(step)
        rates = {}
        for target, group in zip(param_groups, self.groups, strict=True):
            target["lr"] = rates[group.label] = 0.0 if group.module in idle else group.lr * factor
        return rates
