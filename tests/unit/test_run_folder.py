"""The link to the newest run, and a run's folder where a model is asked for."""

from pathlib import Path

import pytest

from train.commands.main import main
from train.errors import CheckpointError
from train.run_folder import RunFolder, model_in


def make_run(folder: Path, *, exported: bool) -> Path:
    folder.mkdir(parents=True)
    RunFolder(folder).config.write_text("run: {}")
    if exported:
        RunFolder(folder).export.mkdir()
        (RunFolder(folder).export / "config.json").write_text("{}")
    return folder


def test_latest_is_a_relative_link_to_the_newest_run(tmp_path: Path) -> None:
    for name in ("2026-01-01", "2026-01-02"):
        run = make_run(tmp_path / "full" / name, exported=True)
        RunFolder(run).link_latest()
    assert (tmp_path / "full" / "latest").readlink() == Path("2026-01-02")
    assert sorted(path.name for path in (tmp_path / "full").iterdir()) == ["2026-01-01", "2026-01-02", "latest"]


def test_what_is_called_latest_and_is_no_link_stays(tmp_path: Path) -> None:
    mine = tmp_path / "full" / "latest"
    mine.mkdir(parents=True)
    (mine / "file").touch()
    RunFolder(make_run(tmp_path / "full" / "one", exported=False)).link_latest()
    assert (mine / "file").exists()
    assert not mine.is_symlink()
    assert sorted(path.name for path in (tmp_path / "full").iterdir()) == ["latest", "one"]


def test_a_disk_without_links_does_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    run = make_run(tmp_path / "one", exported=False)
    monkeypatch.setattr(Path, "symlink_to", refuse)
    RunFolder(run).link_latest()
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


def test_the_model_of_a_run_is_its_export(tmp_path: Path) -> None:
    run = make_run(tmp_path / "full" / "one", exported=True)
    RunFolder(run).link_latest()
    assert model_in(run) == run / "export"
    assert model_in(tmp_path / "full" / "latest") == tmp_path / "full" / "latest" / "export"
    assert model_in(run / "export") == run / "export"
    assert model_in(tmp_path / "elsewhere") == tmp_path / "elsewhere"


@pytest.mark.parametrize("words", [["chat"], ["demo"], ["evaluate", "records.jsonl"]])
def test_a_run_without_an_export_is_named(words: list[str], tmp_path: Path) -> None:
    run = make_run(tmp_path / "one", exported=False)
    with pytest.raises(CheckpointError, match="has no export/ yet"):
        model_in(run)
    with pytest.raises(SystemExit) as ended:
        main([words[0], str(run), *words[1:]])
    assert f"`omnitune export {run}` makes one" in str(ended.value.code)
