"""Exports of a base in the published layout: two bfloat16 shards, foreign files, code of its own."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.builders import make_batch, mixed_samples, tiny_config, tiny_megrezo
from train.errors import CheckpointError
from train.export import model_folder as exporting
from train.export.model_folder import check_base, export
from train.export.shards import INDEX
from train.families.registry import find
from train.modules.adapters import LoraSettings, add_adapters, load_trained
from train.modules.trainable import canonical_name, is_adapter

BATCH = make_batch(mixed_samples(tiny_config()))
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
KEPT = {
    "preprocessor_config.json": '{"auto_map": {"AutoProcessor": "processing_megrezo.MegrezOProcessor"}}',
    "modeling_megrezo.py": "raise ImportError('of another transformers')",
    "README.md": "# 模型\n",
    "assets/voices/one.safetensors": "not weights of the model",
}
LEFT_BEHIND = (
    "pytorch_model.bin",
    "model-00003-of-00003.safetensors",
    "adapter/adapter_config.json",
    "export.json",
    ".git/config",
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    weights = {name: value.to(torch.bfloat16) for name, value in tiny_megrezo().state_dict().items()}
    weights["audio.audio.positional_embedding"] = weights["audio.audio.positional_embedding"].float()
    for number, shard in enumerate(SHARDS):
        held = {name: value.contiguous() for name, value in list(weights.items())[number::2]}
        save_file(held, folder / shard, metadata={"format": "pt", "by": "the publisher"})
    index = {"metadata": {}, "weight_map": {name: SHARDS[number % 2] for number, name in enumerate(weights)}}
    settings = tiny_config().to_dict() | {"auto_map": {"AutoModel": "modeling_megrezo.MegrezO"}, "foreign": [1]}
    files = KEPT | {"config.json": json.dumps(settings), INDEX: json.dumps(index)}
    for name, text in files.items() | dict.fromkeys(LEFT_BEHIND, "stale").items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def lora(**how: Any) -> LoraSettings:
    return LoraSettings(
        {"llm": ("q_proj", "down_proj"), "vision_encoder": ("fc1",)}, rank=4, alpha=8, dropout=0.1, **how
    )


def learned(base: Path, settings: LoraSettings | None, *prefixes: str) -> dict[str, Tensor]:
    """Trained values: of adapters, and of the parameters under `prefixes`."""
    model = find(base).load_model(base, dtype=torch.float32)
    if settings:
        model = add_adapters(model, find(base).rules, settings)
    torch.manual_seed(1)
    return {
        canonical_name(name): value.detach() + 0.1 * torch.randn_like(value)
        for name, value in model.named_parameters()
        if is_adapter(name) or canonical_name(name).startswith(prefixes)
    }


def bits(folder: Path) -> dict[str, Tensor]:
    return {name: value for shard in SHARDS for name, value in load_file(folder / shard).items()}


def header(file: Path) -> bytes:
    with file.open("rb") as opened:
        return opened.read(int.from_bytes(opened.read(8), "little"))


def test_full_tuning_keeps_the_layout(base: Path, tmp_path: Path) -> None:
    trained = learned(base, None, "llm.", "audio.audio.proj")
    folder = export(base, trained, tmp_path / "export", step=7, batch=BATCH)

    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert names == {*KEPT, *SHARDS, INDEX, "config.json", "export.json"}
    assert all((folder / name).read_bytes() == (base / name).read_bytes() for name in (*KEPT, INDEX, "config.json"))
    assert all(header(folder / shard) == header(base / shard) for shard in SHARDS)
    before, after = bits(base), bits(folder)
    for name, value in after.items():
        expected = trained[name].to(torch.bfloat16) if name in trained else before[name]
        assert value.dtype == before[name].dtype
        assert value.equal(expected), name

    report = json.loads((folder / "export.json").read_text())
    assert (report["base"], report["step"], report["mode"], report["records"]) == (str(base), 7, "full", 5)
    assert report["dtype"] == "bfloat16, float32"
    assert report["ok"] is True
    assert 0.001 < report["difference"]["logits"] < 0.2


@pytest.mark.parametrize("how", [{}, {"use_rslora": True, "use_dora": True}], ids=["lora", "rsdora"])
def test_adapters_are_merged_and_kept_apart(how: dict[str, bool], base: Path, tmp_path: Path) -> None:
    settings = lora(**how)
    trained = learned(base, settings, "vision.resampler.")
    folder = export(
        base, trained, tmp_path / "export", step=1, batch=BATCH, lora=settings, fully_tuned=("vision_proj",)
    )
    before, after = bits(base), bits(folder)
    adapted = {f"{name.split('.lora_')[0]}.weight" for name in trained if is_adapter(name)}
    assert len(adapted) == 2 * 2 + 2
    for name, value in after.items():
        if name in adapted and not how:
            a, b = (trained[f"{name.removesuffix('weight')}lora_{part}.default.weight"] for part in "AB")
            assert value.float().equal((before[name].float() + b @ a * 8 / 4).to(torch.bfloat16).float())
        elif name not in adapted:
            assert value.equal(trained[name].to(torch.bfloat16) if name in trained else before[name]), name
        else:
            assert not value.equal(before[name])

    model = find(base).load_model(base, dtype=torch.float32)
    trained_model = add_adapters(find(base).load_model(base, dtype=torch.float32), find(base).rules, settings)
    load_trained(trained_model, trained)
    adapted_model = PeftModel.from_pretrained(model, folder / "adapter")
    with torch.no_grad():
        logits = [each.eval().get_base_model().logits(BATCH) for each in (trained_model, adapted_model)]
    assert (logits[0] - logits[1]).abs().max() < 1e-5  # the adapter lost nothing to bfloat16
    with safe_open(folder / "adapter/adapter_model.safetensors", "pt") as opened:
        assert {opened.get_slice(name).get_dtype() for name in opened.keys()} == {"F32"}  # noqa: SIM118


def test_an_export_that_computes_something_else_is_kept_aside(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One adapted layer of six was not merged."""
    settings = lora()
    folder = export(base, {}, tmp_path / "export", step=0, batch=BATCH)
    honest = exporting.merged_weight
    monkeypatch.setattr(
        exporting, "merged_weight", lambda weight, *how: weight if weight.shape[0] == 48 else honest(weight, *how)
    )
    with pytest.raises(CheckpointError, match=r"is not what was trained: 2 tensors hold .*vision.*fc1.*export\.failed"):
        export(base, learned(base, settings), folder, step=1, batch=BATCH, lora=settings)
    report = json.loads((tmp_path / "export.failed" / "export.json").read_text())
    assert report["ok"] is False
    assert report["wrong"] == [f"vision.vpm.encoder.layers.{layer}.mlp.fc1.weight" for layer in (0, 1)]
    assert json.loads((folder / "export.json").read_text())["step"] == 0
    assert {path.name for path in tmp_path.iterdir()} == {"export", "export.failed"}


def test_an_export_cut_short_leaves_the_one_before(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = export(base, {}, tmp_path / "export", step=1, batch=BATCH)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(exporting, "verify", killed)
        with pytest.raises(KeyboardInterrupt):
            export(base, {}, folder, step=2, batch=BATCH)
        with pytest.raises(KeyboardInterrupt):
            export(base, {}, tmp_path / "other", step=2, batch=BATCH)
    assert json.loads((folder / "export.json").read_text())["step"] == 1
    assert not (tmp_path / "other").exists()
    export(base, {}, folder, step=3, batch=BATCH)
    assert json.loads((folder / "export.json").read_text())["step"] == 3
    assert {path.name for path in tmp_path.iterdir()} == {"export", ".other.partial"}


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(3, 2), nn.Linear(2, 3, bias=False)
        self.head.weight = self.embed.weight


@pytest.mark.parametrize("stored", [["embed.weight"], ["head.weight"], ["embed.weight", "head.weight"]])
def test_tied_weights_are_written_wherever_they_are_stored(stored: list[str], tmp_path: Path) -> None:
    save_file({key: torch.zeros(3, 2) for key in stored}, tmp_path / "model.safetensors")
    out = tmp_path / "out"
    out.mkdir()
    exporting.write_weights(tmp_path, Tied(), {"embed.weight": torch.ones(3, 2)}, out, None)
    written = load_file(out / "model.safetensors")
    assert written.keys() == set(stored)
    assert all(value.equal(torch.ones(3, 2)) for value in written.values())


def test_a_base_with_other_keys_is_refused_before_training(tmp_path: Path) -> None:
    save_file({"embeddings.weight": torch.zeros(3, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"stores 1 of the weights under other keys.*'embed.weight'"):
        check_base(tmp_path, Tied(), ["embed.weight"])


MEASURED = """
import json, sys, torch
from pathlib import Path
from safetensors.torch import save_file
from torch import nn
from train.export.model_folder import write_weights
from train.modules.adapters import LoraSettings, merged_weight

class Skeleton(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False, device="meta") for _ in range(2 * PER_SHARD))

def resident(kind):
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kind)]
    return int(line.split()[1]) * 1024

def measure(trained, lora):
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
    before = resident("VmRSS")
    write_weights(folder, Skeleton(), trained, folder / "out", lora)
    return resident("VmHWM") - before

WIDTH, PER_SHARD = 1024, 24  # 2 MiB a layer, 48 MiB a shard
folder = Path(sys.argv[1])
weight_map = {}
for shard in ("model-0.safetensors", "model-1.safetensors"):
    keys = [f"layers.{len(weight_map) + layer}.weight" for layer in range(PER_SHARD)]
    save_file({key: torch.zeros(WIDTH, WIDTH, dtype=torch.bfloat16) for key in keys}, folder / shard)
    weight_map |= dict.fromkeys(keys, shard)
(folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
(folder / "out").mkdir()
full = measure({key: torch.ones(WIDTH, WIDTH) for key in weight_map}, None)
lora = LoraSettings({}, rank=4, alpha=4, dropout=0)
adapter = {"lora_A.default.weight": torch.ones(4, WIDTH), "lora_B.default.weight": torch.ones(WIDTH, 4)}
merged_weight(torch.ones(WIDTH, WIDTH), adapter, lora)  # which loads peft
adapters = {f"{key[:-7]}.{name}": value for key in weight_map for name, value in adapter.items()}
print(json.dumps({"full": full, "lora": measure(adapters, lora), "shard": (folder / shard).stat().st_size}))
"""


def test_extra_memory_is_less_than_two_shards(tmp_path: Path) -> None:
    """It is that of a few tensors, and of what the allocator keeps between them."""
    command = [sys.executable, "-c", MEASURED, str(tmp_path)]
    measured = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert measured["full"] < measured["shard"]
    assert measured["lora"] < 2 * measured["shard"]
