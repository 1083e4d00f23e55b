"""Shards written again: byte for byte where nothing changed."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from train.errors import CheckpointError
from train.export.shards import INDEX, rewrite_shard, shards_of, stored_dtypes


def test_only_the_named_tensors_change(tmp_path: Path) -> None:
    tensors = {
        "b": torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.bfloat16),
        "a": torch.tensor([1.0, 2.0]),
        "count": torch.tensor(7),
        "empty": torch.empty(0, 3),
    }
    old, new = tmp_path / "old.safetensors", tmp_path / "new.safetensors"
    save_file(tensors, old, metadata={"format": "pt", "note": "kept"})
    rewrite_shard(old, new, {"b": lambda weight: weight.float().T + 0.001})

    before, after = old.read_bytes(), new.read_bytes()
    header = 8 + int.from_bytes(before[:8], "little")
    assert after[:header] == before[:header]  # keys, order, dtypes, shapes, metadata
    assert len(after) == len(before)
    with safe_open(new, "pt") as opened:
        assert opened.metadata() == {"format": "pt", "note": "kept"}
    written = load_file(new)
    assert written["b"].tolist() == [[1.0, 3.0], [2.0, 4.0]]  # 0.001 is less than bfloat16 can tell
    assert all(written[key].equal(tensors[key]) for key in ("a", "count", "empty"))


def test_a_value_of_another_shape_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "old.safetensors")
    with pytest.raises(CheckpointError, match=r"'a' of shape \[2\], and trained was \[3\]"):
        rewrite_shard(tmp_path / "old.safetensors", tmp_path / "new", {"a": lambda _: torch.zeros(3)})


def test_the_index_names_the_shards(tmp_path: Path) -> None:
    for name, dtype in (("model-1.safetensors", torch.float16), ("model-2.safetensors", torch.int64)):
        save_file({name: torch.zeros(1, dtype=dtype)}, tmp_path / name)
    save_file({"x": torch.zeros(1)}, tmp_path / "speaker.safetensors")
    weight_map = {"c": "model-2.safetensors", "a": "model-1.safetensors", "b": "model-2.safetensors"}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert [path.name for path in shards_of(tmp_path)] == ["model-1.safetensors", "model-2.safetensors"]
    assert stored_dtypes(tmp_path) == {"model-1.safetensors": torch.float16}


@pytest.mark.parametrize("name", ["model-3.safetensors", "../model.safetensors"])
def test_a_shard_that_is_not_in_the_folder_is_refused(name: str, tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    model = tmp_path / "model"
    model.mkdir()
    (model / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match=f"lacks the weights '{name}'"):
        shards_of(model)


@pytest.mark.parametrize("keep", [-1, 100, 4, 0])
def test_a_file_cut_short_is_named(keep: int, tmp_path: Path) -> None:
    save_file({"w": torch.zeros(64), "v": torch.zeros(64)}, tmp_path / "model.safetensors")
    file = tmp_path / "model.safetensors"
    assert stored_dtypes(tmp_path) == {"w": torch.float32, "v": torch.float32}
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors' is cut short"):
        stored_dtypes(tmp_path)
    file.write_bytes(b"\xff" * 64)
    with pytest.raises(CheckpointError, match=r"model\.safetensors' is cut short"):
        stored_dtypes(tmp_path)
