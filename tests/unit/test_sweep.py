"""What the runs of a sweep are called, and where they may be started."""

from pathlib import Path

import pytest

from train.commands.sweep import Sweep, name_of, swept_by
from train.errors import ConfigError


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["-m", "lora=lora", "lora.rank=8,16", "run.seed=0"], {"lora.rank"}),
        (["--multirun", "run.seed=range(0,3)", "+recipe=full,lora", "engine=ddp"], {"run.seed", "recipe"}),
        (["-m", "data.train=[a.jsonl,b.jsonl]", "eval.every=5"], set()),
        (["-m", "data.train=a.jsonl,b.jsonl"], {"data.train"}),
    ],
)
def test_the_options_with_several_values_are_found(words: list[str], expected: set[str]) -> None:
    assert swept_by(words) == expected


@pytest.mark.parametrize(
    ("task", "name"),
    [
        (["lora=lora", "lora.rank=8", "run.seed=1"], "lora.rank-8_run.seed-1"),
        (["lora.rank=8", "lora.lr=1e-4"], "lora.rank-8"),
        (["lora.rank='my photos/a.jsonl'"], "lora.rank-my-photos-a.jsonl"),
        (["run.name=x"], "run"),
    ],
)
def test_a_run_is_named_after_what_tells_it_apart(task: list[str], name: str) -> None:
    assert name_of(task, {"lora.rank", "run.seed"}) == name


def test_runs_go_into_one_folder_one_after_the_other_whatever_becomes_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "script.py"
    script.write_text("import sys; print(sys.argv[1:]); sys.exit('rank=1' in sys.argv[1])")
    monkeypatch.setattr("sys.argv", ["main.py", "-m", "lora.rank=1,2", "run.dir=x"])
    sweep = Sweep()
    for rank in ("1", "2", "2"):
        sweep.run(str(script), [f"lora.rank={rank}", "run.dir=x"], str(tmp_path / f"it's {rank}"))
    folder = tmp_path / "it's 1"
    assert sweep.runs == [folder / "lora.rank-1", folder / "lora.rank-2", folder / "lora.rank-2-2"]
    assert sweep.failed == sweep.runs[:1]
    assert f"run 2 of the sweep: {sweep.runs[1]}" in capsys.readouterr().err


def test_a_sweep_on_several_processes_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="a sweep launches each of its runs itself"):
        Sweep().run("main.py", [], str(tmp_path))
