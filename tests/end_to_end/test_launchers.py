"""The ways to start a run: launch.sh, torchrun, accelerate, Slurm; and the one way in which a failed one ends."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from tests.runs import ROOT, clean_environment, write_records

pytestmark = pytest.mark.end_to_end

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch"]
TWO = ["--num_processes=2", "--num_machines=1"]
MAIN = "train/main.py"


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    return [
        *("+recipe=full", *write_records(tmp_path), "data.eval=[]", "tracker=none", f"run.dir={tmp_path / 'run'}"),
        *("run.max_steps=2", "run.packs_per_step=2", "data.max_tokens=256", "data.workers=0"),
    ]


def start(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=ROOT,
        env=clean_environment() | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize(
    ("launcher", "engine", "ranks"),
    [
        pytest.param(["./launch.sh"], "zero2", 1, id="launch.sh-1"),
        pytest.param(["./launch.sh"], "zero2", 2, id="launch.sh-2"),
        pytest.param([*TORCHRUN, MAIN], "zero2", 2, id="torchrun-2"),
        pytest.param([*ACCELERATE, MAIN], "ddp", 1, id="accelerate-1"),
        pytest.param([*ACCELERATE, *TWO, "--multi_gpu", MAIN], "ddp", 2, id="accelerate-2"),
        pytest.param([*ACCELERATE, *TWO, "--use_deepspeed", "--zero_stage=2", MAIN], "zero2", 2, id="accelerate-ds"),
    ],
)
def test_every_launcher_starts_and_ends_well(
    launcher: list[str], engine: str, ranks: int, words: list[str], venv: Path, tmp_path: Path
) -> None:
    done = start([*launcher, *words, f"engine={engine}"], OMNITUNE_VENV=str(venv), NUM_PROCESSES=str(ranks))
    assert done.returncode == 0, done.stderr[-4000:]
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["world_size"] == ranks
    assert done.stderr.splitlines()[-1] == f"exported to {tmp_path / 'run' / 'export'}"


def test_accelerates_configuration_file_is_honoured(words: list[str], tmp_path: Path) -> None:
    file = tmp_path / "accelerate.yaml"
    file.write_text(yaml.safe_dump({"distributed_type": "MULTI_GPU", "num_processes": 2, "mixed_precision": "bf16"}))
    done = start([*ACCELERATE, f"--config_file={file}", MAIN, *words, "run.precision=bf16"])
    assert done.returncode == 0, done.stderr[-4000:]
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["world_size"] == 2


def test_a_launch_that_does_not_fit_the_options_is_refused(words: list[str]) -> None:
    done = start([*ACCELERATE, *TWO, MAIN, *words])
    assert done.returncode == 1
    assert "several processes were asked for, and one was started; add --multi_gpu" in done.stderr


@pytest.mark.parametrize(
    ("failure", "last"),
    [
        ("fault", "error: the disk of rank 1 is full"),
        ("error", "error: rank 1 failed first, with the error above"),
        ("save", "error: checkpoint '"),
        ("kill", "error: rank 1 was killed (SIGKILL), as the system does when memory runs out; see `dmesg` and"),
    ],
)
def test_one_ranks_failure_ends_the_run_and_is_its_last_word(failure: str, last: str, words: list[str]) -> None:
    launcher = [sys.executable, "-m", "train.launcher", "--standalone", "--nproc-per-node=2"]
    began = time.monotonic()
    done = start([*launcher, "tests/end_to_end/failing_rank.py", *words], FAILURE=failure)
    assert time.monotonic() - began < 120
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(last)
    assert ("No space left on device" in done.stderr) == (failure == "save")
    assert ("KeyError: 'the disk of rank 1 is full'" in done.stderr) == (failure == "error")
    assert done.stderr.count("Traceback") == (failure == "error")


def test_torchrun_tells_the_first_failure_too(words: list[str]) -> None:
    done = start([*TORCHRUN, "tests/end_to_end/failing_rank.py", *words], FAILURE="fault")
    assert done.returncode == 1
    assert "error: the disk of rank 1 is full" in done.stderr.split("Root Cause")[1]


def test_a_fault_on_every_rank_is_told_once(words: list[str], venv: Path) -> None:
    environment = {"OMNITUNE_VENV": str(venv), "NUM_PROCESSES": "2"}
    done = start(["./launch.sh", *words, "data.train=[{path: missing.jsonl}]"], **environment)
    assert done.returncode == 1
    assert done.stderr.count("there is no file 'missing.jsonl'") == 1
    assert done.stderr.count("Traceback") == 0
    done = start(["./launch.sh", *words, "run.max_step=3"], **environment)
    assert done.returncode == 1
    assert done.stderr.count("there is no option 'run.max_step'") == 1
    assert done.stderr.count("Traceback") == 0


SRUN = """#!/usr/bin/env bash
# Two tasks on this machine, as srun starts one on each.
SLURM_PROCID=0 "$@" & first=$!
SLURM_PROCID=1 "$@" & second=$!
wait $first; code=$?
wait $second; exit $((code > $? ? code : $?))
"""
SCONTROL = """#!/usr/bin/env bash
case "$1" in
  show) printf '127.0.0.1\\n127.0.0.2\\n' ;;
  *) echo "$@" >> "$SCONTROL_LOG" ;;
esac
"""


@pytest.fixture
def slurm(tmp_path: Path, venv: Path) -> dict[str, str]:
    """The environment of a batch script, with a cluster of this machine alone."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    return {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "OMNITUNE_VENV": str(venv),
        "NUM_PROCESSES": "1",
        "SCONTROL_LOG": str(tmp_path / "scontrol.log"),
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "node[1-2]",
    }


def test_a_slurm_job_trains_on_all_its_machines(words: list[str], slurm: dict[str, str], tmp_path: Path) -> None:
    done = start(["bash", "recipes/slurm.sbatch", *words], **slurm)
    assert done.returncode == 0, done.stderr[-4000:]
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["world_size"] == 2


def test_a_slurm_job_that_has_to_go_saves_and_is_queued_again(
    words: list[str], slurm: dict[str, str], tmp_path: Path
) -> None:
    longer = [*words, "run.max_steps=100000", "run.epochs=100000", "checkpoint.save_every=0"]
    metrics = tmp_path / "run" / "metrics.jsonl"
    environment = clean_environment() | slurm
    with subprocess.Popen(["bash", "recipes/slurm.sbatch", *longer], cwd=ROOT, env=environment) as job:
        deadline = time.monotonic() + 120
        while not metrics.exists() or metrics.read_text().count("loss") < 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        [srun] = psutil.Process(job.pid).children()
        for task in srun.children():  # as Slurm signals the processes of a job's steps, and not its script
            task.terminate()
        assert job.wait(120) == 75
    assert (tmp_path / "scontrol.log").read_text() == f"requeue {os.getpid()}\n"
    assert list((tmp_path / "run" / "checkpoints").glob("step-*/manifest.json"))
