"""The folder of checkpoints: whole or not there, checked, and as many as were asked for."""

import json
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import save_file

from tests.runs import forget_accelerator
from train.engine.checkpoint import Checkpoints
from train.engine.gain import is_better
from train.errors import CheckpointError
from train.export.checkpoint_reader import MANIFEST, SavedState, damage, newest_whole, read_state, trained_weights

PARAMETERS = {"a.weight": [2, 3], "b": [4]}


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    forget_accelerator()
    yield Accelerator(cpu=True)
    forget_accelerator()


def save(checkpoints: Checkpoints, step: int, evaluation: dict[str, float] | None = None) -> None:
    tensors = {"master/a.weight/0": torch.arange(6.0) + step, "master/b/0": torch.ones(4)}
    state = {"step": step, "parameters": PARAMETERS, "evaluation": evaluation or {}, "world_size": 1}
    checkpoints.save(lambda: tensors, state)
    checkpoints.finish()


def test_the_next_copy_is_made_when_the_last_one_is_written(tmp_path: Path, accelerator: Accelerator) -> None:
    """Two copies of a large model would not fit into host memory."""
    checkpoints = Checkpoints(tmp_path, accelerator, keep_last=0)
    written = []
    for step in (1, 2):

        def copied() -> dict[str, torch.Tensor]:
            written.append(sorted(path.name for path in tmp_path.glob("step-*")))
            return {"master/a.weight/0": torch.zeros(6), "master/b/0": torch.ones(4)}

        checkpoints.save(copied, {"step": step, "parameters": PARAMETERS, "evaluation": {}, "world_size": 1})
    checkpoints.finish()
    assert written == [[], ["step-000001"]]


def forge(folder: Path, change: Callable[[dict], object]) -> None:
    """Change what a checkpoint's manifest lists."""
    held = json.loads((folder / MANIFEST).read_text())
    change(held["files"])
    (folder / MANIFEST).write_text(json.dumps(held))


def swap(one: Path, other: Path) -> None:
    """Give each of two checkpoints the other's name; the second one is then lost."""
    shutil.copytree(other, one, dirs_exist_ok=True)


def names(checkpoints: Checkpoints) -> list[str]:
    return [folder.name for folder in checkpoints.complete()]


def test_what_is_saved_is_read(tmp_path: Path, accelerator: Accelerator) -> None:
    checkpoints = Checkpoints(tmp_path, accelerator, keep_last=2)
    save(checkpoints, 7)
    folder = checkpoints.newest()
    assert folder == tmp_path / "step-000007"
    assert sorted(file.name for file in folder.iterdir()) == [MANIFEST, "rank-00000.safetensors", "state.json"]
    assert read_state(folder)["step"] == 7
    assert trained_weights(folder)["a.weight"].tolist() == [[7, 8, 9], [10, 11, 12]]


def test_fragments_of_several_files_are_put_together(tmp_path: Path) -> None:
    save_file({"master/w/0": torch.tensor([0.0, 1, 2])}, tmp_path / "rank-00000.safetensors")
    save_file({"master/w/3": torch.tensor([3.0, 4])}, tmp_path / "rank-00001.safetensors")
    with SavedState(sorted(tmp_path.glob("*.safetensors"))) as saved:
        assert saved.read("master", "w", 0, 5).tolist() == [0, 1, 2, 3, 4]
        assert saved.read("master", "w", 2, 2).tolist() == [2, 3]


def test_the_newest_are_kept_and_the_best(tmp_path: Path, accelerator: Accelerator) -> None:
    checkpoints = Checkpoints(tmp_path, accelerator, keep_last=1, keep_best="eval/loss")
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, 2.5)):
        save(checkpoints, step, {"eval/loss": loss})
    assert names(checkpoints) == ["step-000002", "step-000004"]
    checkpoints = Checkpoints(tmp_path / "other", accelerator, keep_last=1, keep_best="eval/exact_match")
    for step, share in ((1, 0.9), (2, 0.1), (3, 0.2)):
        save(checkpoints, step, {"eval/exact_match": share})
    assert names(checkpoints) == ["step-000001", "step-000003"]


@pytest.mark.parametrize(
    ("figure", "low_is_better"),
    [
        ("eval/loss", True),
        ("eval/loss/train", True),
        ("eval/wer", True),
        ("eval/cer/speech", True),
        ("eval/exact_match/answers", False),
        ("eval/f1/soccer", False),
    ],
)
def test_the_metric_says_which_figure_is_better(figure: str, low_is_better: bool) -> None:
    assert is_better(figure, 0.1, than=0.2) == low_is_better
    assert is_better(figure, 0.2, than=0.1) != low_is_better
    assert not is_better(figure, 0.1, than=0.1)
    assert is_better(figure, 0.1, than=None)
    assert not is_better(figure, float("nan"), than=None)


def test_a_figure_that_is_no_number_is_never_the_best(tmp_path: Path, accelerator: Accelerator) -> None:
    checkpoints = Checkpoints(tmp_path, accelerator, keep_last=1, keep_best="eval/loss")
    for step, loss in ((1, float("nan")), (2, 3.0), (3, float("nan")), (4, float("nan"))):
        save(checkpoints, step, {"eval/loss": loss})
    assert names(checkpoints) == ["step-000002", "step-000004"]


def test_steps_are_ordered_as_numbers(tmp_path: Path, accelerator: Accelerator) -> None:
    checkpoints = Checkpoints(tmp_path, accelerator, keep_last=0)
    for step in (999_999, 1_000_000, 5):
        save(checkpoints, step)
    assert names(checkpoints) == ["step-000005", "step-999999", "step-1000000"]


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[:-1]), "rank-00000.safetensors has 183 bytes, and had 184"),
        (lambda file: file.write_bytes(file.read_bytes()[:-1] + b"x"), "does not have its checksum"),
        (lambda file: file.unlink(), "rank-00000.safetensors is gone"),
        (lambda file: (file.parent / MANIFEST).write_text("{"), "manifest.json cannot be read"),
        (lambda file: (file.parent / MANIFEST).write_text('{"files": ["state.json"]}'), "manifest.json cannot be read"),
        (lambda file: forge(file.parent, lambda files: files[file.name].pop("bytes")), "manifest.json cannot be read"),
        (lambda file: forge(file.parent, lambda files: files.clear()), "manifest.json does not list state.json"),
        (lambda file: forge(file.parent, lambda files: files.pop(file.name)), "does not list rank-00000.safetensors"),
        (lambda file: forge(file.parent, lambda files: files.update({"../x": files[file.name]})), "lists '../x'"),
        (lambda file: shutil.copy(file, file.with_name("rank-00001.safetensors")), "does not list rank-00001.safetens"),
        (lambda file: swap(file.parent, file.parents[1] / "step-000001"), "its state.json is of step 1"),
    ],
)
def test_a_damaged_one_is_named_and_the_one_before_is_used(
    harm, said: str, tmp_path: Path, accelerator: Accelerator, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = Checkpoints(tmp_path, accelerator, keep_last=0)
    save(checkpoints, 1)
    save(checkpoints, 2)
    harm(tmp_path / "step-000002" / "rank-00000.safetensors")
    assert said in str(damage(tmp_path / "step-000002"))
    assert checkpoints.find("auto") == tmp_path / "step-000001"
    assert "step-000002" in caplog.text
    assert said in caplog.text
    with pytest.raises(CheckpointError, match="step-000002"):
        checkpoints.find(str(tmp_path / "step-000002"))
    with pytest.raises(CheckpointError, match="step-000002"):
        trained_weights(tmp_path / "step-000002")


@pytest.mark.parametrize("state", [None, "{", "3", '{"step": 2}', "\udcff"])
def test_a_state_that_cannot_be_read_is_damage(state: str | None, tmp_path: Path, accelerator: Accelerator) -> None:
    checkpoints = Checkpoints(tmp_path, accelerator, keep_last=0, keep_best="eval/loss")
    save(checkpoints, 2)
    file = tmp_path / "step-000002" / "state.json"
    file.unlink()
    if state is not None:
        file.write_text(state, errors="surrogateescape")
    assert "is damaged: state.json" in str(damage(file.parent))
    save(checkpoints, 3, {"eval/loss": 1.0})  # a damaged one disturbs neither the next ones nor the best
    assert checkpoints.find("auto") == tmp_path / "step-000003"


def test_other_folders_are_no_checkpoints(tmp_path: Path, accelerator: Accelerator) -> None:
    checkpoints = Checkpoints(tmp_path, accelerator, keep_last=1)
    save(checkpoints, 1)
    for name in ("step-abc", "step-", "step-1e3", "step-000001.old", "step-²"):
        shutil.copytree(tmp_path / "step-000001", tmp_path / name)
    save(checkpoints, 2)
    assert names(checkpoints) == ["step-000002"]
    assert (tmp_path / "step-abc").is_dir()


def test_the_newest_whole_one_is_exported(
    tmp_path: Path, accelerator: Accelerator, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", accelerator, keep_last=0)
    with pytest.raises(CheckpointError, match="neither a complete checkpoint nor a run's folder"):
        newest_whole(tmp_path)
    for step in (999_998, 999_999, 1_000_000, 1_000_001):
        save(checkpoints, step)
    folders = tmp_path / "checkpoints"
    (folders / "step-1000001" / MANIFEST).unlink()
    (folders / "step-1000000" / "rank-00000.safetensors").unlink()
    assert newest_whole(tmp_path) == folders / "step-999999"
    assert "rank-00000.safetensors is gone" in caplog.text
    assert newest_whole(folders / "step-999998") == folders / "step-999998"
    with pytest.raises(CheckpointError, match=r"rank-00000\.safetensors is gone"):
        trained_weights(newest_whole(folders / "step-1000000"))
    with pytest.raises(CheckpointError, match="neither a complete checkpoint"):
        newest_whole(folders / "step-1000001")


def test_all_damaged_is_an_error_and_none_is_a_fresh_start(tmp_path: Path, accelerator: Accelerator) -> None:
    checkpoints = Checkpoints(tmp_path, accelerator, keep_last=0)
    assert checkpoints.find("auto") is None
    save(checkpoints, 1)
    (tmp_path / "step-000001" / "rank-00000.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"run\.resume=never"):
        checkpoints.find("auto")
    assert checkpoints.find("never") is None


def test_what_was_not_finished_is_not_there_and_is_removed(tmp_path: Path, accelerator: Accelerator) -> None:
    half = tmp_path / ".step-000003"
    half.mkdir()
    (half / "rank-00000.safetensors").write_bytes(b"half")
    (tmp_path / "step-000002").mkdir()
    checkpoints = Checkpoints(tmp_path, accelerator, keep_last=0)
    assert not half.exists()
    assert names(checkpoints) == []


def test_what_cannot_be_written_is_said_at_the_next_step(tmp_path: Path, accelerator: Accelerator) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", accelerator, keep_last=0)
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    with pytest.raises(CheckpointError, match="cannot be written"):
        save(checkpoints, 1)
    with pytest.raises(CheckpointError, match="the ones before are as they were"):
        checkpoints.check()


def test_another_ranks_failure_ends_the_wait_and_is_told(tmp_path: Path) -> None:
    first, second = (
        cast(
            Accelerator,
            SimpleNamespace(
                process_index=rank, num_processes=2, is_main_process=rank == 0, wait_for_everyone=lambda: None
            ),
        )
        for rank in (0, 1)
    )
    checkpoints = [Checkpoints(tmp_path, accelerator, keep_last=0) for accelerator in (first, second)]
    for step, spoiled in ((1, False), (2, True)):
        parts = [{"master/a.weight/0": torch.zeros(6)}, {"master/b/0": torch.ones(4)}]
        if spoiled:
            parts[1]["not/contiguous/0"] = torch.ones(4, 4).T  # which safetensors refuses
        state = {"step": step, "parameters": PARAMETERS, "evaluation": {}, "world_size": 2}
        for rank in (0, 1):
            checkpoints[rank].save(partial(parts.__getitem__, rank), state)
        if spoiled:
            for rank in (0, 1):
                with pytest.raises(CheckpointError, match="contiguous"):
                    checkpoints[rank].finish()
        else:
            checkpoints[1].finish()
            checkpoints[0].finish()
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
    assert trained_weights(tmp_path / "step-000001")["b"].tolist() == [1, 1, 1, 1]
