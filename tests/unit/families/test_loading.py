"""Weights are read once, in the dtype in which they stay, with little memory beside them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from tests.builders import tiny_config, tiny_megrezo
from tests.runs import ROOT
from train.families.registry import find
from train.modules.trainable import module_of


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_megrezo().save_pretrained(tmp_path)  # float32, so that a detour through bfloat16 would show
    return tmp_path


def stored(folder: Path, name: str) -> torch.Tensor:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return file.get_tensor(name)


def test_what_learns_keeps_its_float32_values_beside_bfloat16(folder: Path) -> None:
    family = find(folder)
    in_full = {"vision_proj", "llm"}
    model = family.load_model(
        folder, dtype=torch.bfloat16, in_float32=lambda name: module_of(name, family.rules) in in_full
    )
    seen = set()
    for name, value in model.state_dict().items():
        module = module_of(name, family.rules)
        is_buffer = name == "audio.audio.positional_embedding"
        dtype = torch.float32 if module in in_full or is_buffer else torch.bfloat16
        assert value.dtype is dtype, name
        assert torch.equal(value, stored(folder, name).to(dtype)), name
        seen.add(module)
    assert seen == family.modules | {"frozen"}
    assert type(model).__name__ == "MegrezO"


def test_without_a_choice_the_stored_dtype_stays(folder: Path) -> None:
    for dtype in (None, torch.bfloat16):
        model = find(folder).load_model(folder, dtype=dtype)
        assert {parameter.dtype for parameter in model.parameters()} == {dtype or torch.float32}


LOAD = """
import json, sys, threading, time, re
import torch
from train.families.registry import find

def anonymous():
    return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1])

torch.set_num_threads(1)
family = find(sys.argv[1])
family.skeleton(sys.argv[1])  # imports and first uses are not what is measured
before, peak, ended = anonymous(), 0, False

def watch():
    global peak
    while not ended:
        peak = max(peak, anonymous())
        time.sleep(0.001)

thread = threading.Thread(target=watch)
thread.start()
model = family.load_model(sys.argv[1], dtype=torch.bfloat16, in_float32=lambda name: ".resampler." in name)
ended = True
thread.join()
kept = sum(value.nbytes for value in model.state_dict().values())
print(json.dumps({"kept": kept, "beyond": peak - before - kept}))
"""


def test_loading_takes_at_most_two_shards_beside_what_stays(tmp_path: Path) -> None:
    """A frozen model is stored in float32 (240 MB) and stays in bfloat16: never whole in float32."""
    config = tiny_config(hidden_size=512, intermediate_size=2048, num_hidden_layers=12, vocab_size=4096, head_dim=128)
    config.audio_config |= {"output_dim": 512}
    model = type(tiny_megrezo())(config)
    model.save_pretrained(tmp_path, max_shard_size="20MB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 8
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["kept"] > 100 * 2**20
    assert found["beyond"] < 2 * 20 * 10**6
