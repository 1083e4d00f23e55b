"""What a model folder may hold to be the base of an export, and the room that an export needs."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.builders import make_batch, mixed_samples, tiny_config, tiny_megrezo
from train.errors import CheckpointError
from train.export import base_folder
from train.export.base_folder import check_files
from train.export.model_folder import export

BATCH = make_batch(mixed_samples(tiny_config()))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    tiny_config().save_pretrained(folder)
    weights = {name: value.to(torch.bfloat16) for name, value in tiny_megrezo().state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "words.txt").write_text("a b")
    return folder


def outside(base: Path) -> Path:
    file = base.parent / "secret.txt"
    file.write_text("of somebody else")
    return file


@pytest.mark.parametrize("where", [".", "tokenizer"])
@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("file", "'.*/odd' is a link out of the model folder, to '.*/secret.txt'"),
        ("folder", "'.*/odd' is a link out of the model folder"),
        ("nowhere", "'.*/odd' is a link that leads nowhere"),
        ("self", "'.*/odd' is a link to a folder"),
        ("circle", "'.*/odd' is a link that leads nowhere"),
        ("pipe", "'.*/odd' is neither a file nor a folder"),
    ],
)
def test_what_an_export_could_not_copy_is_refused(kind: str, said: str, where: str, base: Path) -> None:
    odd = base / where / "odd"
    if kind == "pipe":
        os.mkfifo(odd)
    else:
        targets = {"file": outside(base), "folder": base.parent, "nowhere": "gone", "self": ".", "circle": "odd"}
        odd.symlink_to(targets[kind])
    with pytest.raises(CheckpointError, match=said):
        check_files(base)
    with pytest.raises(CheckpointError, match=said):
        export(base, {}, base.parent / "export", step=1, batch=BATCH)
    assert not list(base.parent.glob("*export*"))


def test_an_adapter_in_the_base_is_refused(base: Path) -> None:
    (base / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="the folder holds an adapter"):
        check_files(base)


def test_links_within_the_folder_are_taken(base: Path) -> None:
    (base / "words.txt").symlink_to("tokenizer/words.txt")
    folder = export(base, {}, base.parent / "export", step=1, batch=BATCH)
    assert (folder / "words.txt").read_text() == "a b"
    assert not (folder / "words.txt").is_symlink()


def test_a_snapshot_of_the_hubs_cache_is_taken(base: Path) -> None:
    """models--x--y/snapshots/<revision>/<name> -> ../../blobs/<hash>"""
    cache = base.parent / "models--some--model"
    snapshot = cache / "snapshots" / "0123abcd"
    (cache / "blobs").mkdir(parents=True)
    for number, file in enumerate(path for path in sorted(base.rglob("*")) if path.is_file()):
        shutil.move(file, cache / "blobs" / f"{number:040x}")
        link = snapshot / file.relative_to(base)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(cache / "blobs" / f"{number:040x}", link.parent))
    folder = export(snapshot, {}, base.parent / "export", step=1, batch=BATCH)
    assert (folder / "tokenizer" / "words.txt").read_text() == "a b"
    (snapshot / "more.txt").symlink_to(outside(base))
    with pytest.raises(CheckpointError, match="is a link out of the model folder"):
        check_files(snapshot)


def test_code_of_others_stays_behind_where_ours_goes_along(base: Path) -> None:
    for name in ("tokenization_own.py", "tokenizer/run.py"):
        (base / name).write_text("raise SystemExit('not ours')")
    settings = {"auto_map": {"AutoTokenizer": ["tokenization_own.Own", None]}, "model_max_length": 7}
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    plain = export(base, {}, base.parent / "plain", step=1, batch=BATCH)
    assert (plain / "tokenization_own.py").read_bytes() == (base / "tokenization_own.py").read_bytes()
    with_code = export(base, {}, base.parent / "with_code", step=1, batch=BATCH, with_code=True)
    assert not (with_code / "tokenization_own.py").exists()
    assert not (with_code / "tokenizer" / "run.py").exists()
    assert json.loads((with_code / "tokenizer_config.json").read_text()) == {"model_max_length": 7}
    assert set(json.loads((with_code / "config.json").read_text())["auto_map"].values()) >= {"modeling_megrezo.MegrezO"}


def test_too_small_a_disk_is_said_before_anything_is_written(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(base)
    monkeypatch.setattr(base_folder.shutil, "disk_usage", lambda _: usage._replace(free=100_000))
    with pytest.raises(CheckpointError, match=r"takes 0\.\d\d GB, and the disk has 0.00 GB free; .*`omnitune export`"):
        export(base, {}, base.parent / "export", step=1, batch=BATCH)
    assert not list(base.parent.glob("*export*"))


def test_too_little_memory_is_said_before_anything_is_written(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_folder, "available_memory", lambda: 2**30)
    with pytest.raises(CheckpointError, match=r"take 2\.0 GiB of memory, and 1\.0 GiB are free; .*`omnitune export`"):
        export(base, {}, base.parent / "export", step=1, batch=BATCH)
    assert not list(base.parent.glob("*export*"))
