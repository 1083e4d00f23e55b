"""Where a run happens: the Accelerator, the DeepSpeed configuration, threads and seeds."""

import copy
import logging
import os
import socket
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import (
    DeepSpeedPlugin,
    InitProcessGroupKwargs,
    set_seed,
)

from train.announce import announced
from train.config import Options, Precision
from train.engine.compile_locks import drop_stale_locks
from train.engine.terminal import Terminal
from train.errors import ConfigError
from train.families.family import quieten_transformers

log = logging.getLogger(__name__)

_PATIENCE = timedelta(hours=3)
"""How long a rank waits for the others: they may be measuring a million records, or writing a large model to a slow
disk. A rank that is gone is noticed at once, by its closed connections and by the launcher."""


_OVER_BOTH = "cpu:gloo,cuda:nccl"
"""Ranks on GPUs that can sum tensors of their hosts too, without a wait for the device."""


def hosts_are_connected() -> bool:
    """Whether the ranks can sum tensors that lie on their hosts."""
    return "gloo" in str(torch.distributed.get_backend_config())


def zero_stage(options: Options) -> int:
    """ZeRO stage of the engine; 0 where DeepSpeed is not used."""
    return options.engine.name.zero_stage


def world_size() -> int:
    """Processes that were launched, as the launcher says it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_world_size() -> int:
    """Processes that were launched on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))


def deepspeed_config(options: Options) -> dict[str, Any]:
    """DeepSpeed's configuration: the one place where our options become its own.

    The loss is normalised by us over the whole step, so both counts of accumulation stay at 1.
    Raises ConfigError where `engine.deepspeed` holds what DeepSpeed does not know.
    """
    stage = zero_stage(options)
    zero: dict[str, Any] = {"stage": stage, "contiguous_gradients": True}
    if stage == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    if options.engine.name.offloads:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        if stage == 3:
            zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": options.optim.max_grad_norm,
        "zero_optimization": zero,
        "bf16": {"enabled": options.run.precision is Precision.bf16},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
    }
    merged = _merge(config, options.engine.deepspeed)
    if options.engine.deepspeed:
        _check_by_deepspeed(merged)
    return merged


class _Asked(dict):
    """A dict that remembers the keys it was asked for."""

    def __init__(self, values: dict[str, Any]):
        super().__init__(values)
        self.keys_asked_for: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.keys_asked_for.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.keys_asked_for.add(key)
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self.keys_asked_for.add(str(key))
        return super().__contains__(key)


def _check_by_deepspeed(config: dict[str, Any]) -> None:
    """Let DeepSpeed read the configuration; it refuses what is wrong in its sections, but not unknown sections."""
    from deepspeed.runtime.config import DeepSpeedConfig

    asked = _Asked(copy.deepcopy(config))
    try:
        DeepSpeedConfig(asked)
    except Exception as error:  # of many kinds, pydantic's among them
        raise ConfigError([f"engine.deepspeed: DeepSpeed does not accept it: {error}"]) from None
    unknown = sorted(config.keys() - asked.keys_asked_for)
    if unknown:
        known = ", ".join(sorted(asked.keys_asked_for))
        raise ConfigError([f"engine.deepspeed.{key}: DeepSpeed has no such entry; it knows {known}" for key in unknown])


def _merge(base: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in extra.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def set_convolutions(precision: Precision) -> None:
    """Let CUDA's convolutions compute in float32 where that is asked for: by default they take TF32, with half the
    digits. Matrix products do so only when told to.
    """
    torch.backends.cudnn.allow_tf32 = precision is not Precision.fp32


def make_accelerator(options: Options) -> Accelerator:
    """The Accelerator of the chosen engine, with threads and seeds set (equal on every rank)."""
    on_cuda = torch.cuda.is_available()
    quieten(on_cuda)
    if torch.cuda.device_count() > 1 and world_size() == 1:
        log.warning(
            "one process was started, so one of %d GPUs is used; ./launch.sh starts one for each, "
            "and so does torchrun --nproc-per-node %d train/main.py",
            *[torch.cuda.device_count()] * 2,
        )
    torch.set_num_threads(options.run.threads or max(1, (os.cpu_count() or 1) // local_world_size()))
    handlers = []
    if world_size() > 1 or zero_stage(options):
        on_gpus = None if zero_stage(options) else _OVER_BOTH  # DeepSpeed chooses for itself
        handlers.append(InitProcessGroupKwargs(backend=on_gpus if on_cuda else "gloo", timeout=_PATIENCE))
    plugin = None
    if zero_stage(options):
        drop_stale_locks()
        _single_process_rendezvous()
        plugin = DeepSpeedPlugin(hf_ds_config=deepspeed_config(options))
    first_time = "; the first time on a machine, DeepSpeed compiles an operator, which takes one to three minutes"
    with announced(f"connecting the ranks{first_time if plugin else ''}"):
        accelerator = Accelerator(
            mixed_precision="no",  # no autocast: the model computes in the dtype of its weights
            cpu=not on_cuda and plugin is None,
            deepspeed_plugin=plugin,
            kwargs_handlers=handlers,
        )
    if on_cuda:
        set_convolutions(options.run.precision)
    if options.run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    set_seed(options.run.seed)
    return accelerator


def quieten(on_cuda: bool = False) -> None:
    """Our own words on the main process alone; of the libraries, only what is wrong."""
    is_main = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(handlers=[Terminal()], level=logging.WARNING)
    logging.getLogger("train").setLevel(logging.INFO if is_main else logging.ERROR)
    quieten_transformers()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # workers are forked after the tokenizer was used
    if not on_cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def _single_process_rendezvous() -> None:
    """What DeepSpeed needs to start in a process that no launcher started."""
    if "RANK" in os.environ:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


def close(accelerator: Accelerator) -> None:
    """End cleanly: without this, ZeRO-3 on the CPU sometimes aborts at interpreter exit."""
    accelerator.free_memory()
    accelerator.wait_for_everyone()
    accelerator.end_training()
    GradientState._reset_state()
    AcceleratorState._reset_state(reset_partial_state=True)  # the next job of a sweep may ask for another engine
