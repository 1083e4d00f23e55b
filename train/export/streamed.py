"""A model whose weights are read while a layer runs, and let go after it: any family's own forward in little memory."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from train.errors import CheckpointError
from train.export.shards import stored_dtypes
from train.modules.trainable import canonical_name, names_of_parameters

_ADAPTED = re.compile(r"\.base_layer\.|\.lora_")
"""What follows the name of a layer with adapters, which reads its parts' weights itself."""


def weights_of(folder: Path, model: nn.Module) -> dict[str, str]:
    """The key in a folder's shards of each of a model's parameters and stored buffers, by its (first) canonical name.

    Raises CheckpointError where the folder lacks one.
    """
    names = names_of_weights(model)
    keys: dict[str, str] = {}
    for key in stored_dtypes(folder):
        if key in names and (key == names[key] or names[key] not in keys):
            keys[names[key]] = key
    if lacking := sorted(set(names.values()) - set(keys)):
        raise CheckpointError(
            f"'{folder}' lacks {len(lacking)} of the model's weights, '{lacking[0]}' among them; copy it again"
        )
    return keys


def names_of_weights(model: nn.Module) -> dict[str, str]:
    """Every canonical name under which a model's parameter or stored buffer may be stored, and its first name."""
    return names_of_parameters(model) | {name: name for name in _stored_buffers(model)}


@dataclass(frozen=True)
class _Slot:
    """A parameter's place in a module, and its name."""

    module: nn.Module
    attribute: str
    name: str
    empty: nn.Parameter
    """On the meta device: what stands there while the module does not run."""

    def fill(self, value: Tensor, device: torch.device) -> None:
        if value.shape != self.empty.shape:
            raise CheckpointError(f"'{self.name}' has shape {list(value.shape)}, not {list(self.empty.shape)}")
        value = value.to(device).to(self.empty.dtype)
        self.module._parameters[self.attribute] = nn.Parameter(value, requires_grad=False)

    def clear(self) -> None:
        self.module._parameters[self.attribute] = self.empty


def stream(model: nn.Module, value: Callable[[str], Tensor], device: torch.device) -> None:
    """Let each layer take its parameters from `value`, in float32, when it runs, and let them go after.

    model: parameters on the meta device, buffers filled, with or without adapters (see `Family.skeleton`).
    value: a parameter's or stored buffer's tensor, by canonical name; asked for at each use.
    device: where the model computes, and takes its inputs.
    """
    modules = dict(model.named_modules())
    names = names_of_parameters(model)
    layers: dict[str, list[_Slot]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        path, _, attribute = name.rpartition(".")
        empty = nn.Parameter(parameter.float(), requires_grad=False)
        modules[path]._parameters[attribute] = empty
        layer = _ADAPTED.split(name)[0] if _ADAPTED.search(name) else path
        layers.setdefault(layer, []).append(_Slot(modules[path], attribute, names[canonical_name(name)], empty))
    for name in _stored_buffers(model):
        path, _, attribute = name.rpartition(".")
        modules[path]._buffers[attribute] = value(canonical_name(name)).to(torch.float32, copy=True)
    for module in modules.values():
        module._buffers.update({name: held.to(device) for name, held in module._buffers.items() if held is not None})
    for layer, slots in layers.items():
        _stream_layer(modules[layer], slots, value, device)


def _stream_layer(layer: nn.Module, slots: list[_Slot], value: Callable[[str], Tensor], device: torch.device) -> None:
    def before(*_: object) -> None:
        for slot in slots:
            slot.fill(value(slot.name), device)

    def after(*_: object) -> None:
        for slot in slots:
            slot.clear()

    layer.register_forward_pre_hook(before)
    layer.register_forward_hook(after, always_call=True)


def _stored_buffers(model: nn.Module) -> list[str]:
    """The buffers that belong to a model's weights."""
    buffers = {name for name, _ in model.named_buffers()}
    return [name for name in model.state_dict() if name in buffers]
