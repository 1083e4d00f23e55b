"""Several machines: network namespaces with an address each, in which launch.sh runs as on machines of their own."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.runs import ROOT, clean_environment, losses, succeed, write_records

pytestmark = [
    pytest.mark.end_to_end,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root makes network namespaces"),
    pytest.mark.skipif(shutil.which("ip") is None, reason="needs `ip` (iproute2)"),
]

ADDRESSES = ["10.97.0.1", "10.97.0.2"]


def ip(words: str) -> str:
    return subprocess.run(["ip", *words.split()], check=True, capture_output=True, text=True).stdout


class Machine:
    """A network namespace; `start` runs launch.sh in it as machine number `rank` of two."""

    def __init__(self, rank: int, venv: Path, log: Path):
        self.rank, self.venv, self.log = rank, venv, log
        self.name = f"omnitune-{os.getpid()}-{rank}"
        self.process: subprocess.Popen | None = None

    def start(self, words: list[str], *, before: str = "true") -> None:
        environment = clean_environment() | {
            "OMNITUNE_VENV": str(self.venv),
            "NUM_MACHINES": "2",
            "MACHINE_RANK": str(self.rank),
            "MAIN_ADDRESS": ADDRESSES[0],
            "NUM_PROCESSES": "1",
        }
        inside = ["ip", "netns", "exec", self.name, "bash", "-c", f'{before} && exec ./launch.sh "$@"', "machine"]
        with self.log.open("w") as log:
            self.process = subprocess.Popen([*inside, *words], cwd=ROOT, env=environment, stdout=log, stderr=log)

    def wait(self, timeout_s: float) -> int:
        assert self.process
        return self.process.wait(timeout_s)

    def is_quiet(self) -> bool:
        """Whether none of its processes is left, or will be in a moment."""
        deadline = time.monotonic() + 20
        while ip(f"netns pids {self.name}") and time.monotonic() < deadline:
            time.sleep(0.2)
        return not ip(f"netns pids {self.name}")

    def said(self) -> str:
        return self.log.read_text()

    def kill(self) -> None:
        """End all of the machine's processes at once."""
        for process in ip(f"netns pids {self.name}").split():
            os.kill(int(process), signal.SIGKILL)
        if self.process:
            self.process.wait(30)


@pytest.fixture
def machines(venv: Path, tmp_path: Path) -> Iterator[list[Machine]]:
    both = [Machine(rank, venv, tmp_path / f"machine{rank}.log") for rank in (0, 1)]
    first, second = (machine.name for machine in both)
    try:
        for machine in both:
            ip(f"netns add {machine.name}")
        ip(f"link add eth0 netns {first} type veth peer name eth0 netns {second}")
        for name, address in zip((first, second), ADDRESSES, strict=True):
            ip(f"-n {name} address add {address}/24 dev eth0")
            ip(f"-n {name} link set lo up")
            ip(f"-n {name} link set eth0 up")
        yield both
    finally:
        for machine in both:
            machine.kill()
            ip(f"netns delete {machine.name}")


def words(folder: Path, *more: str) -> list[str]:
    return [
        *("+recipe=full", *write_records(folder, train=60), "data.eval=[]", "tracker=none"),
        *("run.packs_per_step=3", "data.max_tokens=256", "data.workers=0", "optim.eps=1e-6", *more),
    ]


def endless(folder: Path) -> list[str]:
    return words(
        folder,
        "engine=ddp",
        "debug.one_batch=true",
        "run.max_steps=100000",
        "checkpoint.save_every=0",
        f"run.dir={folder / 'run'}",
    )


def wait_for_steps(machine: Machine, folder: Path) -> None:
    deadline = time.monotonic() + 120
    while not (folder / "run" / "metrics.jsonl").exists() or not losses(folder / "run"):
        assert machine.process
        assert machine.process.poll() is None, machine.said()
        assert time.monotonic() < deadline, machine.said()
        time.sleep(0.2)


@pytest.mark.parametrize("engine", ["zero2"])
def test_two_machines_train_as_two_local_ranks(engine: str, machines: list[Machine], tmp_path: Path) -> None:
    options = words(tmp_path, f"engine={engine}", "run.max_steps=3")
    for machine in machines:
        machine.start([*options, f"run.dir={tmp_path / 'machines'}"])
    for machine in machines:
        assert machine.wait(300) == 0, machine.said()
    succeed([*options, f"run.dir={tmp_path / 'local'}"], processes=2)
    assert len(losses(tmp_path / "machines")) == 3
    assert losses(tmp_path / "machines") == pytest.approx(losses(tmp_path / "local"), abs=1e-4)
    assert (tmp_path / "machines" / "export" / "model.safetensors").is_file()


def test_a_killed_machine_ends_the_other(machines: list[Machine], tmp_path: Path) -> None:
    for machine in machines:
        machine.start(endless(tmp_path))
    wait_for_steps(machines[0], tmp_path)
    machines[1].kill()
    assert machines[0].wait(60) == 1
    assert machines[0].said().splitlines()[-1].startswith("error: rank 0 on ")
    assert "lost the connection to another rank" in machines[0].said().splitlines()[-1]
    assert machines[0].is_quiet()


def test_an_unplugged_machine_ends_both(machines: list[Machine], tmp_path: Path) -> None:
    for machine in machines:
        machine.start(endless(tmp_path))
    wait_for_steps(machines[0], tmp_path)
    ip(f"-n {machines[0].name} link set eth0 down")
    for machine, other in zip(machines, (1, 0), strict=True):
        assert machine.wait(60) == 1
        assert machine.said().splitlines()[-1].startswith(f"error: machine {other} is gone")
        assert machine.is_quiet()


@pytest.mark.parametrize("faulty", [0, 1])
def test_a_fault_on_one_machine_is_the_last_word_on_both(faulty: int, machines: list[Machine], tmp_path: Path) -> None:
    options = [*words(tmp_path, "engine=ddp"), f"run.dir={tmp_path / 'run'}"]
    for machine in machines:
        machine.start([*options, *(["data.eval=[{path: only_there.jsonl}]"] if machine.rank == faulty else [])])
    for machine in machines:
        assert machine.wait(60) == 1
        assert "data.eval[0].path: there is no file 'only_there.jsonl'" in machine.said()
        assert machine.said().splitlines()[-1].startswith(f"(rank {faulty} on ")
        assert "Traceback" not in machine.said()


def test_a_folder_that_is_not_shared_is_refused(machines: list[Machine], tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    options = [*words(tmp_path, "engine=ddp"), f"run.dir={disk / 'run'}"]
    machines[0].start(options)
    machines[1].start(options, before=f"mount -t tmpfs none {disk}")
    for machine in machines:
        assert machine.wait(90) == 1
        assert "name a folder on a disk that all machines share" in machine.said()
        assert "Traceback" not in machine.said()
