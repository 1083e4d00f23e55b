"""A first user's whole way at the published size: LoRA on a random Megrez-3B-Omni, killed, resumed, exported, asked.

    python benchmarks/real_size.py [--size 4b | small] [--folder FOLDER] [--vllm PYTHON] [--json FILE]

Each stage is a command that a user would type, in processes of its own. The table has seconds by the wall clock and the
peak of private memory (RssAnon in /proc) of all processes of the stage together.
"""

import argparse
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
import psutil
import soundfile
import torch
from measure import finish, print_table
from PIL import Image
from safetensors.torch import save_file

from train.data.audio import SAMPLE_RATE
from train.families.registry import find

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "data" / "tiny"
"""Its tokenizer and settings serve here too."""

STEPS = 3
KILLED_AFTER = 1

IMAGES = ((1480, 720), (1024, 768), (640, 480))
"""(width, height) in pixels"""
CLIP_S = (30.0, 11.0, 4.0)

PUBLISHED: dict[str, Any] = {"max_position_embeddings": 4096, "hidden_act": "silu", "query_num": 64}
VISION = {"patch_size": 14, "image_size": 980, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
AUDIO = {"n_mels": 128, "n_ctx": 1500, "avg_pool": True, "add_audio_bos_eos_token": True}


@dataclass(frozen=True)
class Size:
    """Sizes of a model in the published layout; shard_bytes: of a file of weights at most."""

    llm: dict[str, int]
    vision: dict[str, int]
    audio: dict[str, int]
    shard_bytes: int


def _llm(vocabulary: int, width: int, mlp: int, layers: int, heads: int, kv_heads: int) -> dict[str, int]:
    heads_of = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": width // heads}
    return {"vocab_size": vocabulary, "hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": layers} | (
        heads_of
    )


def _vision(width: int, mlp: int, layers: int, heads: int) -> dict[str, int]:
    return {
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }


SIZES = {
    "4b": Size(
        _llm(122_880, 2560, 7168, 32, 40, 10),
        _vision(1152, 4304, 27, 16),
        {"n_state": 1280, "n_head": 20, "n_layer": 32, "output_dim": 2560},
        shard_bytes=2 * 10**9,
    ),
    "small": Size(
        _llm(8192, 512, 1408, 8, 8, 2),
        _vision(320, 1280, 6, 5),
        {"n_state": 320, "n_head": 5, "n_layer": 6, "output_dim": 512},
        shard_bytes=30 * 10**6,
    ),
    "tiny": Size(
        _llm(1024, 64, 176, 2, 2, 1),
        _vision(32, 120, 2, 1),
        {"n_state": 32, "n_head": 1, "n_layer": 2, "output_dim": 64},
        shard_bytes=30 * 10**6,
    ),
}


def write_settings(size: Size, folder: Path) -> None:
    """Write all of a model folder but the weights."""
    folder.mkdir(parents=True)
    for file in TINY.iterdir():
        shutil.copyfile(file, folder / file.name)
    tiny = json.loads((TINY / "config.json").read_text())
    config = tiny | PUBLISHED | size.llm | {"dtype": "bfloat16", "initializer_range": 0.02}
    config["vision_config"] = {"model_type": "siglip_vision_model"} | VISION | size.vision
    config["audio_config"] = AUDIO | size.audio
    _write_json(folder / "config.json", config)
    settings = json.loads((TINY / "preprocessor_config.json").read_text())
    _write_json(folder / "preprocessor_config.json", settings | {"scale_resolution": 448, "image_feature_size": 64})


def write_model(size: Size, folder: Path) -> int:
    """Write a random bfloat16 model in the published layout, shard by shard; returns its number of parameters."""
    write_settings(size, folder)
    skeleton = find(folder).skeleton(folder)
    shards: list[dict[str, torch.Tensor]] = [{}]
    random = torch.Generator().manual_seed(0)
    weight_map: dict[str, int] = {}
    for name, empty in skeleton.state_dict().items():
        value = _random(skeleton, name, empty, random)
        if shards[-1] and sum(held.nbytes for held in shards[-1].values()) + value.nbytes > size.shard_bytes:
            save_file(shards[-1], _shard(folder, len(shards)), {"format": "pt"})
            shards[-1].clear()
            shards.append({})
        shards[-1][name] = value
        weight_map[name] = len(shards)
    save_file(shards[-1], _shard(folder, len(shards)), {"format": "pt"})
    parameters = sum(empty.numel() for empty in skeleton.parameters())
    names = {}
    for number in range(1, len(shards) + 1):
        named = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        names[number] = _shard(folder, number).rename(folder / named).name
    index = {
        "metadata": {"total_size": 2 * parameters},
        "weight_map": {key: names[at] for key, at in weight_map.items()},
    }
    _write_json(folder / "model.safetensors.index.json", index)
    return parameters


def _random(skeleton: Any, name: str, empty: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """A value as an initialisation would draw it: norms one, biases zero, matrices normal."""
    parent, _, leaf = name.rpartition(".")
    if empty.dim() > 1:
        return (torch.randn(empty.shape, generator=random) * 0.02).to(torch.bfloat16)
    is_norm = "norm" in type(skeleton.get_submodule(parent)).__name__.lower()
    return torch.full(empty.shape, float(is_norm and leaf == "weight"), dtype=torch.bfloat16)


def _shard(folder: Path, number: int) -> Path:
    return folder / f"part-{number}.safetensors"


def _write_json(file: Path, values: Any) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def write_records(folder: Path) -> Path:
    """Records with images and clips of real sizes, made of noise; returns their file."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    records = []
    for number, ((width, height), seconds) in enumerate(zip(IMAGES, CLIP_S, strict=True)):
        image, clip = f"{number}.jpg", f"{number}.wav"
        Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / image)
        soundfile.write(folder / clip, random.normal(0, 0.1, int(seconds * SAMPLE_RATE)), SAMPLE_RATE)
        for content in ({"image": image}, {"audio": clip}, {"image": image, "audio": clip}):
            asked = {"role": "user", "content": content | {"text": "What is this?"}}
            answer = {"role": "assistant", "content": {"text": "It is noise, of no colour and of every colour."}}
            records.append({"conversations": [asked, answer]})
    file = folder / "records.jsonl"
    file.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    return file


class Watched:
    """A command, with the peak of the private memory of all its processes, which `peak` gives and sets back."""

    def __init__(self, command: list[str], log: Path):
        self.log = log
        self._peak = 0
        self._ended = Event()
        with log.open("a") as out:
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT)
        Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while not self._ended.wait(0.1):
            self._peak = max(self._peak, _private_memory(self.process.pid))

    def peak(self) -> float:
        """GiB since the last call."""
        peak, self._peak = self._peak, 0
        return peak / 2**30

    def until(self, happened: Callable[[], bool]) -> None:
        """Wait for something; raises RuntimeError if the command ends before."""
        while not happened():
            if self.process.poll() is not None and not happened():
                raise RuntimeError(f"the command ended with {self.process.returncode}:\n{self._end_of_log()}")
            time.sleep(0.05)

    def finish(self) -> None:
        """Wait for its end; raises RuntimeError if it failed."""
        code = self.process.wait()
        self._ended.set()
        if code:
            raise RuntimeError(f"the command ended with {code}:\n{self._end_of_log()}")

    def kill(self) -> None:
        """End all its processes at once."""
        for process in [*psutil.Process(self.process.pid).children(recursive=True), psutil.Process(self.process.pid)]:
            process.send_signal(signal.SIGKILL)
        self.process.wait()
        self._ended.set()

    def _end_of_log(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-30:])


def _private_memory(pid: int) -> int:
    """Bytes of RssAnon of a process and all that it started."""
    try:
        processes = [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
    except psutil.Error:
        return 0
    return sum(map(_rss_anon, processes))


def _rss_anon(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon")), 0)


class Table:
    """Stages, each timed from the end of the one before."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self._since = time.monotonic()

    def begin(self) -> None:
        """The next stage begins now."""
        self._since = time.monotonic()

    def add(self, stage: str, peak_gib: float) -> None:
        """A stage has ended."""
        self.rows.append({"stage": stage, "seconds": time.monotonic() - self._since, "peak GiB": peak_gib})
        print(self.rows[-1], flush=True)
        self.begin()


def train_and_export(table: Table, model: Path, records: Path, run: Path) -> None:
    """LoRA steps, a checkpoint, a kill; then the same command to its end, which writes and checks the export."""
    command = [sys.executable, "train/main.py", "+recipe=lora", "model=megrez_3b_omni", f"model.path={model}"]
    command += ["engine=zero2", "data=files", "data.eval=[]", "data.max_tokens=1536"]
    command += [
        "run.packs_per_step=1",
        "run.epochs=9",
        f"run.max_steps={STEPS}",
        f"checkpoint.save_every={KILLED_AFTER}",
    ]
    command += [f"data.train=[{{path: {records}}}]", f"run.dir={run}", "tracker=none"]
    log = run.with_suffix(".log")
    metrics = run / "metrics.jsonl"

    table.begin()
    first = Watched(command, log)
    first.until(lambda: _last_step(metrics) >= KILLED_AFTER)
    table.add("LoRA: command to the end of the first step", first.peak())
    checkpoint = run / "checkpoints" / f"step-{KILLED_AFTER:06d}" / "manifest.json"
    first.until(checkpoint.is_file)
    table.add("checkpoint, beside the next step", first.peak())
    first.kill()

    table.begin()
    second = Watched(command, log)
    second.until(lambda: _last_step(metrics) > KILLED_AFTER)
    table.add("killed; the same command to the end of the next step", second.peak())
    second.until(lambda: _last_step(metrics) >= STEPS)
    table.add("LoRA: another step", second.peak())
    second.until(lambda: (run / "checkpoints" / f"step-{STEPS:06d}" / "manifest.json").is_file())
    second.peak()
    second.until((run / "export" / "export.json").is_file)
    table.add("export with its check, at the run's end", second.peak())
    second.finish()

    shutil.rmtree(run / "export")
    table.begin()
    export = Watched([sys.executable, "-m", "train.commands.main", "export", str(run)], log)
    export.finish()
    table.add("omnitune export, with its check", export.peak())


def _last_step(metrics: Path) -> int:
    if not metrics.is_file():
        return 0
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines() if line.endswith("}")]
    return max(steps, default=0)


def ask(table: Table, export: Path, records: Path, log: Path) -> None:
    """One answer by `omnitune chat`."""
    image = records.parent / "2.jpg"
    table.begin()
    chat = [sys.executable, "-m", "train.commands.main", "chat", str(export), "--image", str(image)]
    asked = Watched([*chat, "--max-new-tokens", "8", "What is this?"], log)
    asked.finish()
    table.add("omnitune chat: an image and 8 tokens of an answer", asked.peak())


VLLM = """
import base64, sys
from pathlib import Path
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    llm = LLM(sys.argv[1], dtype="bfloat16", enforce_eager=True, max_model_len=2048, block_size=32)
    image = "data:image/jpeg;base64," + base64.b64encode(Path(sys.argv[2]).read_bytes()).decode()
    content = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": "What is this?"}]
    sampling = SamplingParams(temperature=0.0, min_tokens=8, max_tokens=8)
    [answer] = llm.chat([[{"role": "user", "content": content}]], sampling, use_tqdm=False)
    assert len(answer.outputs[0].token_ids) == 8
"""


def ask_vllm(table: Table, python: str, export: Path, records: Path, log: Path) -> None:
    """The same answer by vLLM, in an environment of its own."""
    script = log.with_suffix(".py")
    script.write_text(VLLM)
    settings = ["VLLM_CPU_KVCACHE_SPACE=1", "VLLM_ENABLE_V1_MULTIPROCESSING=0"]
    table.begin()
    asked = Watched(["env", *settings, python, str(script), str(export), str(records.parent / "2.jpg")], log)
    asked.finish()
    table.add("vLLM: loading, an image and 8 tokens of an answer", asked.peak())


def main() -> None:
    """Run all stages, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="4b")
    parser.add_argument("--folder", type=Path, help="a disk with 20 GB to spare at 4b (default: a temporary folder)")
    parser.add_argument("--vllm", metavar="PYTHON", help="Python of an environment with vLLM and this project's plugin")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        folder = Path(temporary)
        table = Table()
        parameters = write_model(SIZES[arguments.size], folder / "model")
        table.add(f"writing a random model of {parameters / 1e9:.2f} billion parameters", 0.0)
        records = write_records(folder / "data")
        run, log = folder / "run", folder / "ask.log"
        train_and_export(table, folder / "model", records, run)
        ask(table, run / "export", records, log)
        if arguments.vllm:
            ask_vllm(table, arguments.vllm, run / "export", records, log)
    print_table(table.rows)
    finish({"parameters": parameters, "stages": table.rows}, arguments.json, cores=None)


if __name__ == "__main__":
    main()
