"""What a program asks of its device, watched on the CPU: where it waits, and which copies to it hold it up.

`cpu:0` is taken for the device and `cpu` for the host. Which tensors lie on the device is known by their storages: what
is copied or made there, and what operations make of it.
"""

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.utils import clip_grad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEVICE = torch.device("cpu", 0)

ROOT = str(Path(__file__).parents[3] / "train")

_aten = torch.ops.aten
_WAITING_OPERATIONS = {
    _aten._local_scalar_dense,
    _aten.nonzero,
    _aten.masked_select,
    _aten._unique2,
    _aten.unique_dim,
    _aten.equal,
}
"""Operations whose result, or its size, the host must know: on CUDA they wait."""

_DEVICE_OF = Tensor.device.__get__  # type: ignore[attr-defined]

_READS = {Tensor.cpu, Tensor.tolist, Tensor.numpy}
"""They reach no operation where the tensor lies on the CPU anyway."""


class DeviceWatch(TorchDispatchMode):
    """Within, lists of places in the project's code, `file function`.

    waits: the host asked for a value that lies on the device.
    blocking: a copy to the device without `non_blocking=True`, which waits for its end.
    pageable: a copy to the device of memory that is not pinned: the driver may wait before it is copied aside.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.blocking: list[str] = []
        self.pageable: list[str] = []
        self._on_device: dict[int, StorageWeakRef] = {}  # while it is held, its number is no other storage's
        self._pinned: dict[int, StorageWeakRef] = {}

    def hold(self, *tensors: Tensor) -> None:
        """These lie on the device: parameters, buffers."""
        for tensor in tensors:
            reference = StorageWeakRef(tensor.untyped_storage())
            self._on_device[reference.cdata] = reference

    def pin(self, tensor: Tensor) -> Tensor:
        """The tensor, from now on in pinned memory."""
        reference = StorageWeakRef(tensor.untyped_storage())
        self._pinned[reference.cdata] = reference
        return tensor

    def holds(self, value: Any) -> bool:
        """Whether it is a tensor on the device."""
        return isinstance(value, Tensor) and value.untyped_storage()._cdata in self._on_device

    def copied(self, tensor: Tensor, copy: Tensor, non_blocking: bool) -> Tensor:
        """`copy`, which is the tensor's on the device."""
        if tensor.untyped_storage()._cdata not in self._pinned:
            self.pageable.append(_place())
        if not non_blocking:
            self.blocking.append(_place())
        copy = copy.clone() if copy.untyped_storage()._cdata == tensor.untyped_storage()._cdata else copy
        self.hold(copy)
        return copy

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        here = any(self.holds(value) for value in inputs)
        if here and (func.overloadpacket in _WAITING_OPERATIONS or _has_mask(func, args, self)):
            self.waits.append(_place())
        result = func(*args, **(kwargs or {}))
        if here:
            self.hold(*(value for value in tree_leaves(result) if isinstance(value, Tensor)))
        return result

    @contextmanager
    def watching(self) -> Iterator["DeviceWatch"]:
        """Watch what runs within."""
        with _Calls(self), self:
            yield self


class _Calls(TorchFunctionMode):
    """Calls that never become operations on the CPU: copies to and from `cpu:0`, and reading values."""

    def __init__(self, watch: DeviceWatch):
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        watch = self.watch
        if func in _READS and watch.holds(args[0]):
            watch.waits.append(_place())
            if func is Tensor.cpu:
                return self._on_host(args[0])
        if func is Tensor.to and watch.holds(args[0]) and _target(args, kwargs) == "host":
            watch.waits.append(_place())
            return self._on_host(args[0])
        if func is Tensor.pin_memory:  # torch refuses it without an accelerator
            return watch.pin(args[0].clone())
        result = func(*args, **kwargs)
        if func is Tensor.to and not watch.holds(args[0]) and _target(args, kwargs) == "device":
            return watch.copied(args[0], result, kwargs.get("non_blocking", False))
        if func is torch.tensor and _is_device(kwargs.get("device")):
            return watch.copied(result, result, non_blocking=False)
        if func == _DEVICE_OF and watch.holds(args[0]):
            return DEVICE
        if isinstance(result, Tensor) and _is_device(kwargs.get("device")):
            watch.hold(result)
        return result

    def _on_host(self, tensor: Tensor) -> Tensor:
        with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction():
            return tensor.detach().clone()


def _is_device(device: Any) -> bool:
    return device is not None and torch.device(device) == DEVICE


def _target(args: Any, kwargs: Any) -> str:
    """Where `Tensor.to` puts a tensor: "device", "host", or "" where it only changes the dtype."""
    given = kwargs.get("device", args[1] if len(args) > 1 else None)
    if not isinstance(given, torch.device | str):
        return ""
    if _is_device(given):
        return "device"
    # torch's clip_grad asks C++ for its tensors' device, which says `cpu` of them all
    return "" if sys._getframe(2).f_code.co_filename == clip_grad.__file__ else "host"


def _has_mask(func: Any, args: Any, watch: DeviceWatch) -> bool:
    """Whether an operation indexes by a mask, whose true places are counted first."""
    if func.overloadpacket not in (_aten.index, _aten.index_put, _aten.index_put_):
        return False
    return any(watch.holds(index) and index.dtype in (torch.bool, torch.uint8) for index in args[1])


def _place() -> str:
    frames = [frame for frame in traceback.extract_stack() if frame.filename.startswith(ROOT)]
    if not frames:
        return "outside the project"
    return f"{Path(frames[-1].filename).name} {frames[-1].name}"
