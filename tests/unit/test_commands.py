"""Wrong words and files end a command in one message."""

import json
import shutil
from pathlib import Path

import pytest

from tests.runs import forget_accelerator
from tests.unit.engine.test_checkpoint import save
from train.commands.main import main
from train.engine.checkpoint import Checkpoints


@pytest.mark.parametrize("port", ["99999", "0", "-1", "http"])
def test_a_port_that_is_none(port: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["demo", "model", f"--port={port}"])
    assert ended.value.code == 2
    assert f"argument --port: {port} is no port" in capsys.readouterr().err


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run with a checkpoint."""
    from accelerate import Accelerator

    forget_accelerator()
    save(Checkpoints(tmp_path / "checkpoints", Accelerator(cpu=True), keep_last=0), 1)
    forget_accelerator()
    return tmp_path


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (None, "has no config.yaml"),
        (b"run: [", "config.yaml' does not hold the options of a run"),
        (b"\xff", "config.yaml' does not hold the options of a run"),
        (b"run: {max_stepz: 1}", "config.yaml' does not hold the options of a run"),
    ],
)
def test_an_export_of_a_run_whose_options_cannot_be_read(config: bytes | None, said: str, run: Path) -> None:
    if config is not None:
        (run / "config.yaml").write_bytes(config)
    with pytest.raises(SystemExit) as ended:
        main(["export", str(run)])
    assert str(ended.value.code).startswith("error: ")
    assert said in str(ended.value.code)


def test_an_export_of_a_run_without_a_complete_checkpoint(run: Path) -> None:
    (run / "checkpoints" / "step-000001" / "manifest.json").write_text(json.dumps({"files": {"state.json": {}}}))
    shutil.copytree(run / "checkpoints" / "step-000001", run / "checkpoints" / "step-abc")
    with pytest.raises(SystemExit) as ended:
        main(["export", str(run)])
    assert "is neither a complete checkpoint nor a run's folder that holds one" in str(ended.value.code)
