"""The check of an export, at the published layout: what it computes, what it refuses, what it holds."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.builders import make_batch, mixed_samples, tiny_config, tiny_megrezo
from tests.runs import ROOT
from train.errors import CheckpointError
from train.export import check as verifying
from train.export import model_folder as exporting
from train.export.model_folder import export, write_random_model
from train.export.shards import INDEX, StoredTensors
from train.export.streamed import stream, weights_of
from train.families.registry import find
from train.modules.adapters import LoraSettings, add_adapters, load_trained
from train.modules.trainable import canonical_name, is_adapter

BATCH = make_batch(mixed_samples(tiny_config()))
CPU = torch.device("cpu")
OF_EACH_MODULE = {
    "vision_encoder": "vision.vpm.encoder.layers.1.mlp.fc1.weight",
    "vision_proj": "vision.resampler.attn.in_proj_bias",
    "audio_encoder": "audio.audio.conv1.weight",
    "audio_proj": "audio.audio.proj.weight",
    "llm": "llm.model.layers.0.input_layernorm.weight",
}
LORA = LoraSettings({"llm": ("q_proj", "down_proj"), "audio_encoder": ("query",)}, rank=4, alpha=8, dropout=0.1)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keys, dtype and layout as published: bfloat16, three shards and an index."""
    folder = tmp_path_factory.mktemp("base")
    tiny_config().save_pretrained(folder)
    places = {}
    weights = [(name, value.to(torch.bfloat16)) for name, value in tiny_megrezo().state_dict().items()]
    for number in range(3):
        shard = f"model-{number + 1:05d}-of-00003.safetensors"
        held = dict(weights[number::3])
        save_file(held, folder / shard, metadata={"format": "pt"})
        places |= dict.fromkeys(held, shard)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def learned(base: Path, settings: LoraSettings | None) -> dict[str, Tensor]:
    """Trained values: of all parameters, or of adapters and the vision connector."""
    model = find(base).load_model(base, dtype=torch.float32)
    if settings:
        model = add_adapters(model, find(base).rules, settings)
    torch.manual_seed(1)
    return {
        canonical_name(name): value.detach() + 0.1 * torch.randn_like(value)
        for name, value in model.named_parameters()
        if not settings or is_adapter(name) or canonical_name(name).startswith("vision.resampler.")
    }


def spoil(file: Path, key: str) -> None:
    """Change one number of a tensor, by the least that its dtype can tell."""
    with safe_open(file, "pt") as held:
        metadata = held.metadata()
    weights = load_file(file)
    bits = weights[key].view(-1).view(torch.int16)
    bits[0] ^= 1
    save_file(weights, file, metadata=metadata)


@pytest.mark.parametrize("settings", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("module", OF_EACH_MODULE)
def test_one_number_off_in_any_module_is_refused(
    module: str, settings: LoraSettings | None, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = OF_EACH_MODULE[module]
    shard = json.loads((base / INDEX).read_text())["weight_map"][key]
    honest = exporting.write_weights

    def write(base: Path, skeleton: Any, trained: Any, folder: Path, lora: Any) -> None:
        honest(base, skeleton, trained, folder, lora)
        spoil(folder / shard, key)

    monkeypatch.setattr(exporting, "write_weights", write)
    with pytest.raises(CheckpointError, match=f"1 tensors hold other values, '{key}' among them"):
        export(
            base,
            learned(base, settings),
            tmp_path / "export",
            step=1,
            batch=BATCH,
            lora=settings,
            fully_tuned=("vision_proj",) if settings else (),
        )
    assert not (tmp_path / "export").exists()


def test_one_number_off_in_the_adapter_is_refused(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = exporting.save_adapter

    def write(skeleton: Any, rules: Any, lora: Any, trained: Any, folder: Path, **more: Any) -> None:
        honest(skeleton, rules, lora, trained, folder, **more)
        spoil(folder / "adapter_model.safetensors", "base_model.model.audio.audio.blocks.1.attn.query.lora_B.weight")

    monkeypatch.setattr(exporting, "save_adapter", write)
    with pytest.raises(CheckpointError, match=r"1 tensors .*'adapter: audio.audio.blocks.1.attn.query.lora_B"):
        export(
            base,
            learned(base, LORA),
            tmp_path / "export",
            step=1,
            batch=BATCH,
            lora=LORA,
            fully_tuned=("vision_proj",),
        )


def test_a_wrong_way_of_merging_is_refused(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the export holds what that way gives: the adapters beside their layers compute something else."""
    honest = exporting.merged_weight
    for module in (exporting, verifying):
        monkeypatch.setattr(module, "merged_weight", lambda weight, *how: honest(weight, *how) * 1.001)
    with pytest.raises(CheckpointError, match="a layer computes other values with its adapter merged"):
        export(
            base,
            learned(base, LORA),
            tmp_path / "export",
            step=1,
            batch=BATCH,
            lora=LORA,
            fully_tuned=("vision_proj",),
        )


def test_a_weight_that_is_not_finite_is_refused(base: Path, tmp_path: Path) -> None:
    trained = learned(base, None)
    trained["llm.model.norm.weight"][3] = float("nan")
    with pytest.raises(CheckpointError, match="logits differ by nan"):
        export(base, trained, tmp_path / "export", step=1, batch=BATCH)


@pytest.mark.parametrize("how", [None, {}, {"use_dora": True, "use_rslora": True}], ids=["plain", "lora", "rsdora"])
def test_a_streamed_model_computes_what_a_loaded_one_does(how: dict[str, bool] | None, base: Path) -> None:
    family = find(base)
    settings = None if how is None else LoraSettings(LORA.targets, rank=4, alpha=8, dropout=0.1, **how)
    trained = learned(base, settings)
    loaded = family.load_model(base, dtype=torch.float32)
    skeleton = family.skeleton(base)
    keys, tensors = weights_of(base, skeleton), StoredTensors(base)
    streamed = skeleton
    if settings:
        loaded, streamed = (add_adapters(model, family.rules, settings) for model in (loaded, skeleton))
    load_trained(loaded, trained)
    stream(streamed, lambda name: trained[name] if name in trained else tensors[keys[name]], CPU)
    models = [model.eval().get_base_model() if settings else model.eval() for model in (loaded, streamed)]
    with torch.no_grad():
        assert models[1].logits(BATCH).equal(models[0].logits(BATCH))
    assert all(parameter.is_meta for parameter in streamed.parameters())


@pytest.mark.parametrize("name", ["tiny_instruct", "tiny_minicpm"])
def test_text_models_are_streamed_too(name: str, tmp_path: Path) -> None:
    """MiniCPM's head is its embedding, stored once."""
    write_random_model(ROOT / "data" / name, tmp_path / name, seed=0)
    family = find(tmp_path / name)
    skeleton = family.skeleton(tmp_path / name)
    keys, tensors = weights_of(tmp_path / name, skeleton), StoredTensors(tmp_path / name)
    stream(skeleton, lambda name: tensors[keys[name]], CPU)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        loaded = family.load_model(tmp_path / name).eval()
        assert skeleton.eval()(input_ids=ids).logits.equal(loaded(input_ids=ids).logits)


MEASURED = """
import sys, threading, time, torch
from pathlib import Path
from safetensors.torch import save_file
from tests.builders import make_batch, mixed_samples, tiny_config
from train.families.megrezo import MEGREZO
from train.export.check import verify

def anonymous():
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
    return int(line.split()[1]) * 1024

def watch():
    while not done:
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.001)

folder = Path(sys.argv[1])
config = tiny_config(hidden_size=512, intermediate_size=2048, num_hidden_layers=24, vocab_size=4096)
config.audio_config["output_dim"] = 512
config.save_pretrained(folder)
shapes = {name: value.shape for name, value in MEGREZO.skeleton(folder).state_dict().items()}
for part in range(4):
    save_file(
        {name: torch.full(shape, 0.01, dtype=torch.bfloat16) for name, shape in list(shapes.items())[part::4]},
        folder / f"model-{part}.safetensors",
    )
names = list(shapes)
places = {name: f"model-{place % 4}.safetensors" for place, name in enumerate(names)}
import json
(folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
batch = make_batch(mixed_samples(config))
whole = sum(shape.numel() for shape in shapes.values()) * 4
for _ in range(2):  # the first time loads libraries
    done, peak, before = [], [0], anonymous()
    watcher = threading.Thread(target=watch)
    watcher.start()
    report = verify(MEGREZO, folder, {}, folder, batch, None)
    done.append(1)
    watcher.join()
assert report["ok"], report
print(json.dumps({"whole": whole, "taken": peak[0] - before}))
"""


def test_the_check_holds_few_layers(tmp_path: Path) -> None:
    command = [sys.executable, "-c", MEASURED, str(tmp_path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    measured = json.loads(done.stdout)
    shutil.rmtree(tmp_path)
    assert measured["whole"] > 250e6
    assert measured["taken"] < measured["whole"] / 4
