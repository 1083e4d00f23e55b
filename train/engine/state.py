"""The trained state by parameter name: what each rank holds of it under any engine, and how it goes back.

Fragments and their keys: see `export.checkpoint_reader`. Writing takes no communication.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from train.config import OptimizerName
from train.engine.engines import DeepSpeedEngine, Engine, OwnEngine
from train.engine.optimizer import prepare_moments
from train.errors import CheckpointError
from train.export.checkpoint_reader import MASTER, MOMENTS, SavedState
from train.modules.trainable import canonical_name


def shape_of(parameter: nn.Parameter) -> torch.Size:
    """A parameter's shape as the layer sees it: whole under ZeRO-3, which leaves an empty vector in its place."""
    return getattr(parameter, "ds_shape", parameter.shape)


def size_of(parameter: nn.Parameter) -> int:
    """Values of a parameter as the layer sees it: whole under ZeRO-3, unpacked where 4-bit values share a byte."""
    if state := getattr(parameter, "quant_state", None):
        return state.shape.numel()
    return shape_of(parameter).numel()


class TrainedState(ABC):
    """The trained parameters of a model as the engine wrapped it, and their optimizer state.

    Every rank must call `load` alike; `tensors` takes no other rank.
    """

    def __init__(self, accelerator: Accelerator, model: nn.Module, optimizer: OptimizerName):
        self.accelerator, self.optimizer = accelerator, optimizer
        self.parameters = {
            canonical_name(name): parameter
            for name, parameter in accelerator.unwrap_model(model).named_parameters()
            if parameter.requires_grad
        }

    def description(self) -> dict[str, Any]:
        """What state.json says of it: the shape of each parameter, by name, and the optimizer."""
        shapes = {name: list(shape_of(parameter)) for name, parameter in self.parameters.items()}
        return {"parameters": shapes, "optimizer": str(self.optimizer)}

    def tensors(self) -> dict[str, Tensor]:
        """Copies of this rank's part on the CPU, by key: float32, and 8-bit codes as they are."""
        return {
            f"{kind}/{name}/{start}": values.to(
                "cpu", torch.float32 if values.is_floating_point() else values.dtype, copy=True
            )
            for name, kind, start, values in self._held()
        }

    def load(self, saved: SavedState, description: Mapping[str, Any], updates: int) -> None:
        """Go back to a saved state.

        description: of the saved state; it must be this run's.
        updates: optimizer updates that were made, by which Adam corrects its moments' bias.
        """
        mine, shapes = self.description()["parameters"], description["parameters"]
        if mine != shapes:
            different = sorted(name for name in mine.keys() | shapes.keys() if mine.get(name) != shapes.get(name))
            raise CheckpointError(
                f"the checkpoint holds other trained parameters than this run has: {len(different)} differ, "
                f"'{different[0]}' among them; resume with the same model, modules.* and lora.*"
            )
        saved_by = description.get("optimizer", OptimizerName.adamw)
        if saved_by != self.optimizer:
            raise CheckpointError(
                f"the checkpoint holds the state of optim.name={saved_by}, and this run has optim.name="
                f"{self.optimizer}; resume with optim.name={saved_by}, or start anew from the run's export"
            )
        if updates:
            self._prepare_moments(updates)
        with torch.no_grad():
            self._load(saved, (MASTER, *MOMENTS) if updates else (MASTER,))

    @abstractmethod
    def _held(self) -> Iterator[tuple[str, str, int, Tensor]]:
        """(name, kind, start, flat values) of the fragments that this rank writes."""

    @abstractmethod
    def _prepare_moments(self, updates: int) -> None:
        """Make room for moments in a new optimizer, and set its count of updates."""

    @abstractmethod
    def _load(self, saved: SavedState, kinds: tuple[str, ...]) -> None:
        """Put fp32 master weights and moments in their places, and what the model computes with."""


class WholeState(TrainedState):
    """Every rank holds everything (one process, DDP); each writes every `world size`-th parameter."""

    def __init__(self, accelerator: Accelerator, engine: OwnEngine, optimizer: OptimizerName):
        super().__init__(accelerator, engine.model, optimizer)
        self.masters, self.optimizers = engine.masters, engine.optimizers

    def _held(self) -> Iterator[tuple[str, str, int, Tensor]]:
        share = slice(self.accelerator.process_index, None, self.accelerator.num_processes)
        for name, parameter in list(self.parameters.items())[share]:
            master = self.masters[parameter]
            yield name, MASTER, 0, master.detach().flatten()
            for kind, values in self.optimizers.state_of(master).items():
                yield name, kind, 0, values.flatten()

    def _prepare_moments(self, updates: int) -> None:
        self.optimizers.prepare_state(updates)

    def _load(self, saved: SavedState, kinds: tuple[str, ...]) -> None:
        for name, parameter in self.parameters.items():
            master = self.masters[parameter]
            for kind, target in {MASTER: master, **self.optimizers.state_of(master)}.items():
                target.copy_(saved.read(kind, name, 0, target.numel()).view_as(target))
        self.masters.write_back()


class _ShardedByDeepSpeed(TrainedState):
    def __init__(self, accelerator: Accelerator, engine: DeepSpeedEngine, optimizer: OptimizerName):
        super().__init__(accelerator, engine.model, optimizer)
        self._zero: Any = engine.model.optimizer


class LinkedState(_ShardedByDeepSpeed):
    """ZeRO-1 and 2: each rank holds a part of a flat vector of fp32 master weights; it may begin and end inside one."""

    def _link(self) -> None:
        # DeepSpeed links the moments after the first group's first update, when the other groups have none yet.
        self._zero._hp_optimizer_states_linked = False
        self._zero._lazy_init_hp_params_optimizer_state()

    def _fragments(self) -> Iterator[tuple[str, nn.Parameter, Any]]:
        for name, parameter in self.parameters.items():
            if parameter._hp_mapping is not None:
                yield name, parameter, parameter._hp_mapping

    def _held(self) -> Iterator[tuple[str, str, int, Tensor]]:
        self._link()
        for name, _, mapping in self._fragments():
            start = mapping.lp_fragment_address.start
            yield name, MASTER, start, mapping.get_hp_fragment()
            for kind in MOMENTS:
                if kind in mapping.get_optim_state_keys():
                    yield name, kind, start, mapping.get_hp_fragment(kind)

    def _prepare_moments(self, updates: int) -> None:
        prepare_moments(self._zero.optimizer, self._zero.single_partition_of_fp32_groups, updates)
        self._link()

    def _load(self, saved: SavedState, kinds: tuple[str, ...]) -> None:
        for name, _, mapping in self._fragments():
            start, size = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
            for kind in kinds:
                target = mapping.get_hp_fragment(None if kind == MASTER else kind)
                target.copy_(saved.read(kind, name, start, size))
        for name, parameter in self.parameters.items():  # what the model computes with is whole on every rank
            parameter.data.copy_(saved.read(MASTER, name, 0, parameter.numel()).view_as(parameter))


class ShardedState(_ShardedByDeepSpeed):
    """ZeRO-3: each rank holds the same stretch of every parameter, the last one filled up with zeros."""

    def _extent(self, parameter: Any) -> tuple[int, int]:
        """Where this rank's stretch of the parameter begins, and its size without the filling."""
        size = parameter.ds_tensor.numel()
        start = min(size * self.accelerator.process_index, parameter.ds_numel)
        return start, min(size, parameter.ds_numel - start)

    def _held(self) -> Iterator[tuple[str, str, int, Tensor]]:
        from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

        zero = self._zero
        flat = zero.fp32_partitioned_groups_flat
        has_moments = bool(flat) and set(MOMENTS) <= set(zero.optimizer.state.get(flat[0], ()))
        for name, parameter in self.parameters.items():
            start, size = self._extent(parameter)
            if not size:
                continue
            yield name, MASTER, start, safe_get_local_fp32_param(parameter)[:size]
            for kind in MOMENTS if has_moments else ():
                yield name, kind, start, safe_get_local_optimizer_state(parameter, kind)[:size]

    def _prepare_moments(self, updates: int) -> None:
        zero = self._zero
        prepare_moments(zero.optimizer, zero.fp32_partitioned_groups_flat, updates)

    def _load(self, saved: SavedState, kinds: tuple[str, ...]) -> None:
        from deepspeed.runtime.zero import GatheredParameters
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        for name, parameter in self.parameters.items():
            start, size = self._extent(parameter)
            for kind in kinds:
                values = torch.zeros(parameter.ds_tensor.numel())
                values[:size] = saved.read(kind, name, start, size)
                if kind == MASTER:
                    safe_set_local_fp32_param(parameter, values)
                else:
                    safe_set_local_optimizer_state(parameter, values, kind)
            with GatheredParameters([parameter], modifier_rank=0):
                if self.accelerator.is_main_process:
                    parameter.data.copy_(saved.read(MASTER, name, 0, parameter.numel()).view_as(parameter))


def trained_state(accelerator: Accelerator, engine: Engine, optimizer: OptimizerName, zero_stage: int) -> TrainedState:
    """The trained state under an engine."""
    if isinstance(engine, OwnEngine):
        return WholeState(accelerator, engine, optimizer)
    assert isinstance(engine, DeepSpeedEngine)
    return (ShardedState if zero_stage == 3 else LinkedState)(accelerator, engine, optimizer)
