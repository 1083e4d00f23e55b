"""GPU memory of a training step, from the real model on fake tensors: no weights, no device, no values.

The model's parameters are fake tensors on the CPU, and a dispatch mode sums the storages that live, as CUDA's allocator
rounds them. Two of the CPU's ways become CUDA's: attention by one operator (which fake tensors take, see
`modules.attention`), dropout that keeps a mask of bytes.
"""

import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from train.config import Options
from train.engine.accelerator import zero_stage
from train.engine.build_model import compute_dtype_of, weight_dtypes, with_trainable
from train.engine.masters import MasterWeights
from train.engine.optimizer import matrices
from train.families.family import Family
from train.modules.objectives import NextToken
from train.modules.packed import PackedModel, without_adapters
from train.modules.trainable import is_adapter, module_of
from train.schema import Batch

_ROUND = 512
"""Bytes to which CUDA's allocator rounds up."""


@dataclass(frozen=True)
class Measured:
    """Bytes of a micro-batch on one device without sharding, and the values that learn.

    peak is the most that lives at a time while gradients are held; weights, masters and gradients are parts of it.
    """

    weights: int
    masters: int
    """fp32 master weights that our engines keep apart; DeepSpeed's are not among what is measured"""
    gradients: int
    peak: int
    trained: int
    """values that learn"""
    largest_group: int
    """values of the largest group of parameters that an optimizer updates together"""
    by_muon: int
    """values that learn in the matrices that Muon would update"""
    quantizable: int
    """values that QLoRA would store in 4 bit"""

    @property
    def activations(self) -> int:
        """What lives at the peak beside weights, master weights and gradients."""
        return self.peak - self.weights - self.masters - self.gradients


class LiveBytes(TorchDispatchMode):
    """Sums the bytes of all storages that operations within it return, for as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._held: dict[int, Any] = {}

    def hold(self, tensor: Tensor) -> None:
        """Count a tensor's storage, once."""
        storage = tensor.untyped_storage()
        if storage._cdata in self._held:
            return
        size = -(-storage.nbytes() // _ROUND) * _ROUND
        self._held[storage._cdata] = weakref.ref(storage, partial(self._let_go, storage._cdata, size))
        self.now += size
        self.peak = max(self.peak, self.now)

    def _let_go(self, key: int, size: int, _: Any) -> None:
        del self._held[key]
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.hold(leaf)
        return out


def measure_step(options: Options, family: Family, folder: Path, batch: Batch) -> Measured:
    """Bytes of a step's micro-batch that is not the first: it holds the gradients of those before.

    folder: a model folder, of which the configuration is read.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    model = _fake_model(options, family, folder, mode)
    fake = _fake_batch(batch, mode)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with LiveBytes() as live:
        masters = None if zero_stage(options) else _masters(options, trained, mode)
        if not masters:
            _hold_gradients(trained, mode)
        weights = [*model.parameters(), *model.buffers()]
        for held in weights:
            live.hold(held)
        NextToken().loss(model, fake).total.backward()
    apart = [masters[parameter] for parameter in trained if masters[parameter] is not parameter] if masters else []
    gradients = masters.buckets if masters else [value.grad for value in trained if value.grad is not None]
    return Measured(
        weights=_bytes(weights),
        masters=_bytes(apart),
        gradients=_bytes(gradients),
        peak=live.peak,
        trained=sum(parameter.numel() for parameter in trained),
        largest_group=_largest_group(model, family),
        by_muon=sum(value.numel() for value in matrices(model) if value.requires_grad),
        quantizable=_quantizable(model, family),
    )


def _hold_gradients(trained: Sequence[nn.Parameter], mode: FakeTensorMode) -> None:
    with mode:
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)


def _masters(options: Options, trained: Sequence[nn.Parameter], mode: FakeTensorMode) -> MasterWeights:
    """Our engines' own master weights and gradients."""
    with mode:
        return MasterWeights(trained, compute_dtype_of(options))


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Of the tensors' storages, as CUDA's allocator rounds them; what several share is counted once."""
    storages = {storage._cdata: storage.nbytes() for storage in (tensor.untyped_storage() for tensor in tensors)}
    return sum(-(-size // _ROUND) * _ROUND for size in storages.values())


def _largest_group(model: nn.Module, family: Family) -> int:
    sizes: dict[Any, int] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            group = module_of(name, family.rules), is_adapter(name), parameter.ndim > 1
            sizes[group] = sizes.get(group, 0) + parameter.numel()
    return max(sizes.values(), default=0)


def _quantizable(model: nn.Module, family: Family) -> int:
    head = without_adapters(model).get_output_embeddings()
    return sum(
        layer.weight.numel()
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear)
        and layer is not head
        and "lora_" not in name
        and module_of(f"{name}.weight", family.rules) == "llm"
    )


def _fake_model(options: Options, family: Family, folder: Path, mode: FakeTensorMode) -> nn.Module:
    """The model as it is trained, without values, in training mode."""
    skeleton: PackedModel = family.skeleton(folder)
    dtype, in_float32 = weight_dtypes(options, family)
    for name, parameter in skeleton.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if in_float32 and in_float32(name) else dtype)
    model = with_trainable(options, family, skeleton).train()
    skeleton.liger_loss = False  # whose kernel takes no fake tensors
    fakes: dict[int, nn.Parameter] = {}
    for part in list(model.modules()):
        for name, child in part.named_children():
            if isinstance(child, nn.Dropout) and child.p:
                setattr(part, name, _Dropout(child.p))
        for name, parameter in list(part.named_parameters(recurse=False)):
            if id(parameter) not in fakes:
                with mode:
                    empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                fakes[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
            part._parameters[name] = fakes[id(parameter)]
    return model


def _fake_batch(batch: Batch, mode: FakeTensorMode) -> Batch:
    """The batch with fake tensors in place of all but those that lie on the CPU always."""
    return batch._map(mode.from_tensor, on_cpu=lambda tensor: tensor)


class _Dropout(nn.Module):
    """Dropout that keeps a mask of bytes, as CUDA's does."""

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, values: Tensor) -> Tensor:
        return torch.native_dropout(values, self.p, True)[0]
