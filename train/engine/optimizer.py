"""AdamW over the module groups, and the learning rate as a pure function of the step."""

from collections.abc import Collection
from math import cos, pi
from typing import Any

import torch

from train.config import OptimOptions, Schedule
from train.modules.trainable import Group


def make_optimizer(groups: list[Group], optim: OptimOptions) -> torch.optim.Optimizer:
    """AdamW with one parameter group per (module, decay).

    Where DeepSpeed offloads, accelerate makes its CPU Adam of this one; handed a DeepSpeedCPUAdam, it would
    rebuild that without decoupled weight decay.
    """
    parameters = [{"params": group.parameters, "lr": group.lr, "weight_decay": group.weight_decay} for group in groups]
    beta1, beta2 = optim.betas
    return torch.optim.AdamW(parameters, betas=(beta1, beta2), eps=optim.eps, fused=True)


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

    def set(self, optimizer: Any, step: int, idle: Collection[str] = ()) -> dict[str, float]:
        """Put the step's rates into the optimizer; returns them by group, for the metrics.

        idle: modules that no sample of the step uses. Their rate is 0, so that neither weight decay nor old
        moments move them; their moments fade as in any step whose gradient is zero.
        """
        factor = self.factor(step)
        rates = {}
        for target, group in zip(optimizer.param_groups, self.groups, strict=True):
            target["lr"] = rates[group.label] = 0.0 if group.module in idle else group.lr * factor
        return rates
