"""Real runs for tests: small record files of the sample, launched processes, and runs built in this process."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState, GradientState, PartialState
from transformers.integrations import unset_hf_deepspeed_config

from train.commands.options import compose_options
from train.engine.build import Run, build
from train.export.model_folder import write_random_model

ROOT = Path(__file__).resolve().parents[1]
SAMPLE = ROOT / "data" / "sample"


def write_records(folder: Path, *, train: int = 24, held_out: int = 6) -> list[str]:
    """Record files of the sample's first lines, and the Hydra words that make them the data."""
    words = []
    for name, source, count in (("train", "train", train), ("eval", "heldout", held_out)):
        lines = (SAMPLE / f"{source}.jsonl").read_text(encoding="utf-8").splitlines()[:count]
        file = folder / f"{name}.jsonl"
        file.write_text("\n".join(lines), encoding="utf-8")
        words.append(f"data.{name}=[{{path: {file}, root: {SAMPLE}}}]")
    return words


def write_small_model(folder: Path) -> Path:
    """Settings of a model smaller than the tiny one, for tests of many runs; returns their folder."""
    model = folder / "model"
    shutil.copytree(ROOT / "data" / "tiny", model)
    config = json.loads((model / "config.json").read_text())
    config |= {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    config["vision_config"] |= {"hidden_size": 32, "intermediate_size": 64}
    config["vision_config"] |= {"num_hidden_layers": 1, "num_attention_heads": 1}
    config["audio_config"] |= {"n_state": 32, "n_head": 1, "n_layer": 1, "output_dim": 64}
    (model / "config.json").write_text(json.dumps(config))
    return model


def write_small_qwen_omni(folder: Path) -> Path:
    """The same of Qwen2.5-Omni."""
    model = folder / "model"
    shutil.copytree(ROOT / "data" / "tiny_qwen_omni", model)
    config = json.loads((model / "config.json").read_text())
    thinker = config["thinker_config"]
    thinker["text_config"] |= {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    thinker["text_config"] |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    thinker["vision_config"] |= {"hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 64}
    thinker["vision_config"] |= {"depth": 2, "num_heads": 1, "fullatt_block_indexes": [1]}
    thinker["audio_config"] |= {"d_model": 32, "encoder_ffn_dim": 64, "output_dim": 64}
    thinker["audio_config"] |= {"encoder_layers": 1, "encoder_attention_heads": 1}
    (model / "config.json").write_text(json.dumps(config))
    return model


def write_small_gemma4(folder: Path) -> Path:
    """The same of Gemma 4."""
    model = folder / "model"
    shutil.copytree(ROOT / "data" / "tiny_gemma4", model)
    config = json.loads((model / "config.json").read_text())
    config["text_config"] |= {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4}
    config["text_config"] |= {"num_attention_heads": 2, "layer_types": 2 * ["sliding_attention", "full_attention"]}
    config["vision_config"] |= {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    config["vision_config"] |= {"num_attention_heads": 1, "num_key_value_heads": 1}
    config["audio_config"] |= {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1}
    config["audio_config"] |= {"output_proj_dims": 64}
    (model / "config.json").write_text(json.dumps(config))
    return model


def write_endless_model(folder: Path) -> Path:
    """A small random model that never ends its turn; returns its folder."""
    export = folder / "export"
    write_random_model(write_small_model(folder), export, seed=0)
    ends = json.loads((export / "config.json").read_text())["eos_token_id"]
    (export / "generation_config.json").write_text(json.dumps({"eos_token_id": ends, "suppress_tokens": [ends]}))
    return export


def clean_environment() -> dict[str, str]:
    """This process's variables without what a launcher or W&B would read, for runs on one CPU thread a rank."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") and "WANDB" not in name
    }
    return environment | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def environment_python(name: str) -> Path:
    """The Python of an environment of tests/environments.sh, which makes it where it is missing (minutes)."""
    subprocess.run([ROOT / "tests" / "environments.sh", name], check=True)
    return ROOT / os.environ.get("OMNITUNE_VENVS", ".venvs") / name / "bin" / "python"


def launch(
    words: list[str], *, processes: int = 1, timeout_s: float = 560, script: str = "train/main.py"
) -> subprocess.CompletedProcess[str]:
    """Run training (or another script) in processes of its own (gloo on the CPU), as launch.sh does."""
    environment = clean_environment()
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [*launcher, script, *words]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True, start_new_session=True
    ) as process:
        try:
            stdout, stderr = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the ranks too, not the launcher alone
            raise
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


def succeed(words: list[str], **how: Any) -> subprocess.CompletedProcess[str]:
    """`launch`, and insist on success."""
    done = launch(words, **how)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return done


def forget_accelerator() -> None:
    """Let the next Accelerator of this process be another one."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._shared_state.clear()


def forget(run: Run) -> None:
    """Let go of a run's engine; with `forget_accelerator` the next run can be built in the same processes."""
    run.accelerator.free_memory()
    unset_hf_deepspeed_config()
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)


def trained_model(run: Run) -> Any:
    """The model that a run without ranks has trained, in eval mode and with its adapters, if it has any, inside."""
    model = run.trainer.train_step.engine.model.eval()
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def build_here(words: list[str]) -> Run:
    """A run built in this process, after forgetting the one before."""
    forget_accelerator()
    return build(*compose_options(["engine=none", "tracker=none", "data.workers=0", *words]))


def losses(folder: Path) -> list[float]:
    """The loss of each step of a run."""
    return [line["loss"] for line in metrics(folder) if "loss" in line]


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
