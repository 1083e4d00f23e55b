"""What learns, and how fast: one ordered list of rules that covers every parameter, or fails."""

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import nn

from train.errors import OmniTuneError

FROZEN = "frozen"
"""Name of the module whose parameters never learn."""

Rules = Sequence[tuple[str, str]]
"""(pattern of parameter names, module) in order; the first pattern that fits decides."""

_WRAPPING = re.compile(r"^module\.|base_model\.model\.|\.base_layer|\.modules_to_save\.default|\.original_module")
_ADAPTER = re.compile(r"\.lora_\w+\.")


def canonical_name(name: str) -> str:
    """A parameter's name in the checkpoint, without what DDP and peft put around it."""
    return _WRAPPING.sub("", name)


def is_adapter(name: str) -> bool:
    """Whether the parameter belongs to a LoRA adapter."""
    return bool(_ADAPTER.search(name))


def names_of_parameters(model: nn.Module) -> dict[str, str]:
    """Every canonical name of a parameter, and its first one: tied parameters have several."""
    first: dict[int, str] = {}
    return {
        canonical_name(name): first.setdefault(id(parameter), canonical_name(name))
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }


def module_of(name: str, rules: Rules) -> str:
    """The module that a parameter belongs to, or FROZEN.

    >>> module_of("llm.lm_head.weight", [("vision.*", "vision_encoder"), ("llm.*", "llm")])
    'llm'
    """
    plain = canonical_name(name)
    for pattern, module in rules:
        if fnmatchcase(plain, pattern):
            return module
    raise OmniTuneError(f"no rule of the model family covers the parameter '{plain}'; add one to its declaration")


def choose_trainable(model: nn.Module, rules: Rules, *, tuned: Iterable[str], adapted: Iterable[str] = ()) -> None:
    """Let exactly what is tuned require gradients.

    A tuned module learns in full; a tuned module that is `adapted` learns through its adapters alone.
    """
    tuned, adapted = set(tuned), set(adapted)
    for name, parameter in model.named_parameters():
        module = module_of(name, rules)
        parameter.requires_grad_(module in tuned and (module not in adapted or is_adapter(name)))


@dataclass(frozen=True)
class Group:
    """Parameters that share a learning rate and a weight decay."""

    label: str
    """its name in the metrics: the module, or "<module>.lora" """
    module: str
    lr: float
    weight_decay: float
    by_muon: bool
    parameters: list[nn.Parameter]


def parameter_groups(
    model: nn.Module,
    rules: Rules,
    *,
    rates: Mapping[str, float],
    adapter_rate: float,
    weight_decay: float,
    shape_of: Callable[[nn.Parameter], torch.Size] = lambda parameter: parameter.shape,
    by_muon: Collection[nn.Parameter] = (),
) -> list[Group]:
    """The trainable parameters by module, decay and optimizer; matrices decay, vectors and single tensors do not.

    Adapters are groups of their own, named "<module>.lora", at `adapter_rate`.
    shape_of: a parameter's shape, which engines that shard it know.
    by_muon: what Muon updates; AdamW takes the rest.
    """
    collected: dict[tuple[str, str, float, float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        module = module_of(name, rules)
        label, rate = (f"{module}.lora", adapter_rate) if is_adapter(name) else (module, rates[module])
        decay = weight_decay if len(shape_of(parameter)) > 1 else 0.0
        collected.setdefault((label, module, rate, decay, parameter in by_muon), []).append(parameter)
    return [Group(*about, found) for about, found in collected.items()]
