"""The repeated layers of a model, of the language model and of the towers: which are computed again in the backward,
and how they are compiled.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from train.errors import TrainingError
from train.modules.attention import Segments
from train.modules.packed import PackedModel

_GRAPHS = 8
"""Graphs that one kind of layer may need: with and without gradients of its input, over a dummy, frozen, ..."""

_ROWS, _SEGMENTS = 4096, 32
"""What torch shall take for the usual numbers of tokens and of segments: those of the first pack would decide how
kernels add up, and a resumed run has another first pack."""


def repeated_layers(part: nn.Module) -> Iterator[list[GradientCheckpointingLayer]]:
    """Each row of layers in a part of a model, first layer first."""
    for module in part.modules():
        if isinstance(module, nn.ModuleList):
            layers = [layer for layer in module if isinstance(layer, GradientCheckpointingLayer)]
            if layers and len(layers) == len(module):
                yield layers


def checkpoint_layers(model: PackedModel, *, llm: int, towers: int) -> None:
    """Keep only the input of every n-th layer, and compute the layer again in the backward.

    llm, towers: n in the language model and in the towers; 1 = of all layers, 0 = of none.
    """
    for part, every in [(model.llm, llm), *((tower, towers) for tower in model.towers.values())]:
        for layers in repeated_layers(part):
            for index, layer in enumerate(layers):
                layer.gradient_checkpointing = every > 0 and index % every == 0
                layer._gradient_checkpointing_func = partial(  # type: ignore[assignment]
                    checkpoint, use_reentrant=False
                )


def compile_layers(model: PackedModel, **options: Any) -> None:
    """Compile each repeated layer where it stands: names of parameters and keys of the state stay.

    Only training runs compiled; a layer in evaluation mode, and so generation, does not. It comes last: after adapters
    and `checkpoint_layers`.

    options: more of `torch.compile` (backend).
    """
    import torch._dynamo
    import torch._inductor.config

    layers = [layer for part in (model.llm, *model.towers.values()) for row in repeated_layers(part) for layer in row]
    # All layers are called through one function of torch, so that they share one limit.
    torch._dynamo.config.recompile_limit = _GRAPHS * len({type(layer) for layer in layers})
    torch._dynamo.config.optimize_ddp = False  # it would split each layer at DDP's buckets
    if torch.are_deterministic_algorithms_enabled():
        torch._inductor.config.deterministic = True  # else timings choose among kernels that round differently
    for layer in layers:
        layer._compiled_call_impl = _Compiled(layer, options)


class _Compiled:
    """How a compiled layer is called."""

    def __init__(self, layer: GradientCheckpointingLayer, options: Mapping[str, Any]):
        self.layer, self.is_checkpointed = layer, layer.gradient_checkpointing
        layer.gradient_checkpointing = False  # it is done here, around what is compiled
        self.compiled = torch.compile(layer._call_impl, fullgraph=True, dynamic=True, **options)

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not self.layer.training:
            return self.layer._call_impl(hidden, *args, **kwargs)
        _mark_dynamic(hidden, (*args, *kwargs.values()))
        if self.is_checkpointed:
            return checkpoint(self._run, hidden, *args, use_reentrant=False, **kwargs)
        return self._run(hidden, *args, **kwargs)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return self.compiled(*args, **kwargs)
        except torch._dynamo.exc.FailOnRecompileLimitHit as error:
            raise TrainingError(
                f"run.compile: {type(self.layer).__name__} needed more than {torch._dynamo.config.recompile_limit} "
                "graphs, so something in it changes from pack to pack; leave the option out (TORCH_LOGS=recompiles "
                "tells what it is)"
            ) from error


def _mark_dynamic(hidden: Tensor, others: Iterator[Any] | tuple[Any, ...]) -> None:
    """Tell torch that the number of tokens (of `hidden` (..., T, D)) and of segments changes from pack to pack."""
    row = hidden.dim() - 2
    tokens = hidden.shape[row]
    for value in (hidden, *others):
        if isinstance(value, Segments):
            torch._dynamo.mark_dynamic(value.cu_seqlens, 0, hint_override=_SEGMENTS)
        elif isinstance(value, tuple):
            _mark_dynamic(hidden, value)
        elif isinstance(value, Tensor) and value.dim() > row and value.shape[row] == tokens > 1:
            torch._dynamo.mark_dynamic(value, row, hint_override=_ROWS)
