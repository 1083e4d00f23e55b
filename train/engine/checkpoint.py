"""Checkpoints: all that resuming needs, and the trained weights by name."""

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from train.errors import CheckpointError
from train.modules.trainable import canonical_name

log = logging.getLogger(__name__)

TRAINED = "trained.safetensors"
"""The float32 masters of all that learns, by the parameters' names in the model's checkpoint."""

STATE = "state.json"
"""Where the run stands; its presence marks a checkpoint as complete."""


def trained_state(accelerator: Accelerator, model: nn.Module) -> dict[str, Tensor]:
    """Float32 masters of the trainable parameters, on the CPU; filled on the main process alone.

    Every rank must call it: sharded weights are gathered one by one.
    """
    if accelerator.distributed_type == "DEEPSPEED":
        from deepspeed.utils import safe_get_full_fp32_param as full_master
    else:

        def full_master(parameter: Tensor) -> Tensor:
            return parameter.detach()

    state = {}
    for name, parameter in accelerator.unwrap_model(model).named_parameters():
        if parameter.requires_grad:
            master = full_master(parameter)
            if accelerator.is_main_process:
                state[canonical_name(name)] = master.to("cpu", torch.float32, copy=True)
    return state


def load_trained_state(folder: Path) -> dict[str, Tensor]:
    """The trained weights of a checkpoint folder."""
    file = folder / TRAINED
    if not file.is_file():
        raise CheckpointError(f"'{folder}' holds no {TRAINED}, so it is not a checkpoint of a run")
    return load_file(file)


class Checkpoints:
    """The checkpoints/ folder of a run."""

    def __init__(self, folder: Path, accelerator: Accelerator, *, keep_last: int):
        self.folder, self.accelerator, self.keep_last = folder, accelerator, keep_last

    def save(self, model: nn.Module, state: Mapping[str, Any]) -> Path:
        """Write a checkpoint aside, then give it its name; every rank must call it.

        state: JSON values, `step` among them.
        """
        accelerator = self.accelerator
        final = self.folder / f"step-{state['step']:06d}"
        aside = self.folder / f".{final.name}.partial"
        if accelerator.is_main_process:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(aside / "engine"))
        trained = trained_state(accelerator, model)
        if accelerator.is_main_process:
            save_file(trained, aside / TRAINED)
            (aside / STATE).write_text(json.dumps({**state, **self._setting()}, indent=2))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            shutil.rmtree(final, ignore_errors=True)
            aside.rename(final)
            self._forget_old()
        accelerator.wait_for_everyone()
        return final

    def _setting(self) -> dict[str, Any]:
        return {
            "world_size": self.accelerator.num_processes,
            "engine": str(self.accelerator.distributed_type.value),
        }

    def _forget_old(self) -> None:
        if self.keep_last:
            for old in self.complete()[: -self.keep_last]:
                shutil.rmtree(old)

    def complete(self) -> list[Path]:
        """The complete checkpoints, oldest first."""
        return sorted(folder for folder in self.folder.glob("step-*") if (folder / STATE).is_file())

    def find(self, resume: str) -> Path | None:
        """The checkpoint that `run.resume` means, if any."""
        if resume == "never":
            return None
        if resume == "auto":
            found = self.complete()
            return found[-1] if found else None
        folder = Path(resume)
        if not (folder / STATE).is_file():
            raise CheckpointError(f"run.resume: '{folder}' is not a complete checkpoint (it has no {STATE})")
        return folder

    def load(self, folder: Path) -> dict[str, Any]:
        """Put the engine back to where the checkpoint was; returns its state."""
        state = json.loads((folder / STATE).read_text())
        for name, now in self._setting().items():
            if state[name] != now:
                raise CheckpointError(
                    f"'{folder}' was written with {name} {state[name]}, and this run has {now}; "
                    f"resume with {name} {state[name]}, or start anew from its export"
                )
        self.accelerator.load_state(str(folder / "engine"))
        log.info("resumed from %s", folder)
        return state
