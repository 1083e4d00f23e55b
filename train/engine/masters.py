"""fp32 master weights and fp32 gradients of what is trained, where no DeepSpeed engine keeps them."""

import weakref
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

_BUCKET = 64 * 2**20
"""Gradient values (of 4 bytes) that are summed over the ranks by one call; a larger parameter has a call of its own."""


class MasterWeights:
    """The float32 weights that the optimizer updates, and their gradients, summed in float32.

    A parameter that the model computes with in bf16 has a master weight of its own. Its gradient is added to the
    master's as soon as a micro-batch has computed it, and freed. A float32 parameter is its own master weight.

    The gradients are stretches of a few flat buckets. On several ranks, the last backward of a step sums each bucket
    over the ranks as soon as it is complete, while it goes on computing; always in the same order on every rank.

    parameters: those that are trained, float32; they become `dtype` here.
    buckets: the gradients, float32.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], dtype: torch.dtype):
        self.parameters = list(parameters)
        self.masters = [_master(parameter, dtype) for parameter in self.parameters]
        self._master_of = dict(zip(self.parameters, self.masters, strict=True))
        self._ranks = dist.get_world_size() if dist.is_initialized() else 1
        self.buckets: list[Tensor] = []
        self._bucket_of: dict[nn.Parameter, int] = {}
        for number, members in enumerate(_bucketed(self.parameters[::-1])):  # a backward begins with the last layers
            self.buckets.append(_flat_gradients([self._master_of[member] for member in members]))
            self._bucket_of |= dict.fromkeys(members, number)
        self._missing: list[int] | None = None
        """In the last backward of a step: gradients that each bucket still waits for."""
        self._sums: list[dist.Work] = []
        take = weakref.WeakMethod(self._take)  # a cycle through torch's own objects would never be freed
        for parameter in self.parameters:
            parameter.register_post_accumulate_grad_hook(lambda found: cast(Any, take())(found))

    def __getitem__(self, parameter: nn.Parameter) -> nn.Parameter:
        """The master weight of a parameter."""
        return self._master_of[parameter]

    def reduce_in_next_backward(self) -> None:
        """Let the next backward, the last of a step, sum the gradients over the ranks."""
        if self._ranks > 1:
            self._missing = [0] * len(self.buckets)
            for number in self._bucket_of.values():
                self._missing[number] += 1

    def finish_reduction(self) -> None:
        """Have all gradients summed; the device waits, the host does not."""
        if self._missing is not None:
            self._sum_complete(all_of_them=True)
            for work in self._sums:
                work.wait()
            self._missing, self._sums = None, []

    def clip(self, limit: float) -> Tensor:
        """Scale the gradients down to a global L2 norm; returns the norm before, float32 (), on the device."""
        return nn.utils.clip_grad_norm_(self.masters, limit)

    def zero_gradients(self) -> None:
        for bucket in self.buckets:
            bucket.zero_()

    @torch.no_grad()
    def write_back(self) -> None:
        """Round the master weights into what the model computes with."""
        for parameter, master in self._master_of.items():
            if parameter is not master:
                parameter.copy_(master)

    def _take(self, parameter: nn.Parameter) -> None:
        master = self._master_of[parameter]
        if master is not parameter:
            cast(Tensor, master.grad).add_(cast(Tensor, parameter.grad))
            parameter.grad = None
        if self._missing is not None:
            self._missing[self._bucket_of[parameter]] -= 1
            self._sum_complete()

    def _sum_complete(self, *, all_of_them: bool = False) -> None:
        """Begin to sum the buckets that are next in order and complete."""
        assert self._missing is not None
        while (number := len(self._sums)) < len(self.buckets) and (all_of_them or not self._missing[number]):
            self._sums.append(dist.all_reduce(self.buckets[number], async_op=True))


def _master(parameter: nn.Parameter, dtype: torch.dtype) -> nn.Parameter:
    if parameter.dtype == dtype:
        return parameter
    master = nn.Parameter(parameter.detach())
    parameter.data = parameter.detach().to(dtype)
    return master


def _bucketed(parameters: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Parameters of one device in their order, by buckets."""
    buckets: list[list[nn.Parameter]] = []
    room = 0
    for parameter in parameters:
        if parameter.numel() > room:
            buckets.append([])
            room = _BUCKET
        buckets[-1].append(parameter)
        room -= parameter.numel()
    return buckets


def _flat_gradients(masters: Sequence[nn.Parameter]) -> Tensor:
    """Zeros that hold all the gradients, one after the other; each `grad` is a view of its stretch."""
    sizes = [master.numel() for master in masters]
    flat = torch.zeros(sum(sizes), device=masters[0].device)
    for master, stretch in zip(masters, flat.split(sizes), strict=True):
        master.grad = stretch.view_as(master)
    return flat
