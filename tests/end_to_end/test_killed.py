"""Killed at any instant, stopped, out of space: the run goes on as if nothing had been."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.runs import ROOT, clean_environment, launch, losses, metrics, succeed, write_records, write_small_model
from train.export.checkpoint_reader import damage
from train.launcher.failure import STOPPED

pytestmark = pytest.mark.end_to_end

STEPS = 14


def words(folder: Path, out: str, engine: str) -> list[str]:
    if not (folder / "model").exists():
        write_small_model(folder)
    return [
        *write_records(folder, train=48),
        *(f"model.random_from={folder / 'model'}", f"run.dir={folder / out}", "data.eval=[]", "tracker=none"),
        *(f"run.max_steps={STEPS}", "run.epochs=9", "run.packs_per_step=3", "data.max_tokens=256", "data.workers=1"),
        *("optim.warmup_ratio=0", "checkpoint.save_every=2", "run.threads=1", f"engine={engine}"),
    ]


def start(command: list[str], processes: int) -> subprocess.Popen[str]:
    """Training as launch.sh starts it, in a process group of its own."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "train.launcher", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.Popen(
        [*launcher, "train/main.py", *command],
        cwd=ROOT,
        env=clean_environment(),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def steps_done(run: Path) -> int:
    file = run / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


def wait_for(condition, process: subprocess.Popen[str]) -> None:
    """Until the condition holds or the process ends."""
    while not condition() and process.poll() is None:
        time.sleep(0.005)


def kill_and_resume(folder: Path, engine: str, processes: int, *, kills: int, seed: int) -> int:
    """Kill a run, also during its saves, until it has been killed that often or ends; then insist on its losses.

    Returns how many kills met the run alive.
    """
    draw = random.Random(seed)
    succeed(words(folder, "straight", engine), processes=processes)
    command, run = words(folder, "killed", engine), folder / "killed"
    met = 0
    for kill in range(kills):
        process = start(command, processes)
        begun = steps_done(run)
        if kill % 2:  # while a checkpoint is being written
            aim = run / "checkpoints"
            wait_for(lambda aim=aim: any(aim.glob(".step-*")), process)
        else:
            target = begun + draw.randint(0, 3)
            wait_for(lambda target=target, begun=begun: steps_done(run) > target or steps_done(run) < begun, process)
            time.sleep(draw.uniform(0, 0.3))
        met += process.poll() is None
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        if steps_done(run) >= STEPS:
            break
    succeed(command, processes=processes)
    assert losses(run) == losses(folder / "straight")
    assert [line["step"] for line in metrics(run)] == list(range(1, STEPS + 1))
    assert not list((run / "checkpoints").glob(".step-*"))
    return met


@pytest.mark.parametrize(("engine", "processes"), [("none", 1), ("zero2", 2), ("zero3", 2)])
def test_a_killed_run_has_the_losses_of_one_that_was_not(engine: str, processes: int, tmp_path: Path) -> None:
    assert kill_and_resume(tmp_path, engine, processes, kills=1 + (processes == 1), seed=processes) > 0


@pytest.mark.exhaustive
@pytest.mark.timeout(0)
def test_twenty_kills(tmp_path: Path) -> None:
    met = 0
    for number, (engine, processes) in enumerate([("none", 1), ("zero2", 2), ("zero3", 2), ("zero2", 1)] * 5):
        if met >= 20:
            break
        folder = tmp_path / str(number)
        folder.mkdir()
        met += kill_and_resume(folder, engine, processes, kills=4, seed=number)
    assert met >= 20


@pytest.mark.parametrize(("processes", "engine"), [(1, "none"), (2, "zero2")])
def test_asked_to_stop_it_saves_and_says_so_by_its_exit_code(processes: int, engine: str, tmp_path: Path) -> None:
    succeed(words(tmp_path, "straight", engine), processes=processes)
    command, run = [*words(tmp_path, "stopped", engine), "checkpoint.save_every=0"], tmp_path / "stopped"
    process = start(command, processes)
    wait_for(lambda: steps_done(run) >= 2, process)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode == STOPPED, said[-3000:]
    assert "to resume, run the same command with run.dir=" in said
    assert "Traceback" not in said
    [checkpoint] = (run / "checkpoints").iterdir()
    assert int(checkpoint.name.removeprefix("step-")) == steps_done(run) < STEPS
    assert damage(checkpoint) is None
    assert not (run / "export").exists()
    succeed(command, processes=processes)
    assert losses(run) == losses(tmp_path / "straight")


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    command, run = words(tmp_path, "run", "none"), tmp_path / "run"
    first = start([*command, "run.max_steps=100000", "run.epochs=10000", "checkpoint.save_every=0"], 1)
    wait_for(lambda: steps_done(run) >= 1, first)
    second = launch(command)
    assert first.poll() is None
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    assert second.returncode == 1
    assert "another run is writing to" in second.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk takes root")
def test_a_full_disk_stops_the_run_and_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=14m", "tmpfs", disk], check=True)
    try:
        command = [*words(tmp_path, "disk/run", "none"), "checkpoint.keep_last=0"]
        done = launch(command)
        assert done.returncode == 1
        assert "cannot be written" in done.stderr
        assert "No space left on device" in done.stderr
        assert "Traceback" not in done.stderr
        kept = sorted((disk / "run" / "checkpoints").iterdir())
        assert [folder.name for folder in kept][:1] == ["step-000002"]
        assert [damage(folder) for folder in kept] == [None] * len(kept)
        subprocess.run(["mount", "-o", "remount,size=200m", disk], check=True)
        succeed(command)
        assert len(losses(disk / "run")) == STEPS
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk takes root")
@pytest.mark.parametrize("room", ["64k", "256k"])
def test_a_disk_that_is_full_at_the_start_is_a_message(room: str, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", disk], check=True)
    try:
        done = launch([*words(tmp_path, "disk/run", "none"), "checkpoint.save_every=0"])
        assert done.returncode == 1
        assert "No space left on device" in done.stderr
        assert "Traceback" not in done.stderr
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_no_key_is_written_anywhere(tmp_path: Path) -> None:
    secret = "0123456789abcdef0123456789abcdef01234567"
    command = [*words(tmp_path, "run", "none"), "run.max_steps=2", "tracker=wandb"]
    environment = clean_environment() | {"WANDB_API_KEY": secret, "WANDB_MODE": "offline", "HF_TOKEN": secret}
    done = subprocess.run(
        [sys.executable, "train/main.py", *command], cwd=ROOT, env=environment, capture_output=True, check=True
    )
    assert secret.encode() not in done.stdout + done.stderr
    files = [file for file in (tmp_path / "run").rglob("*") if file.is_file()]
    assert any("wandb" in str(file) for file in files)
    assert [file for file in files if secret.encode() in file.read_bytes()] == []
