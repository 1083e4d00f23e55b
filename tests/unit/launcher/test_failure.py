"""Which rank's failure is shown, and how."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from train.launcher.failure import first_failure

SCRIPT = """
import sys
from train.launcher.failure import report_failure
with report_failure(lambda error: str(error) if isinstance(error, ValueError) else None):
    raise eval(sys.argv[1])
"""


def failing(error: str, file: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {"PYTHONPATH": str(Path(__file__).parents[3])}
    if file:
        environment["TORCHELASTIC_ERROR_FILE"] = str(file)
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, error], env=environment, capture_output=True, text=True, check=False
    )


def failure(folder: Path, error: str | None, exitcode: int = 1, rank: int = 0) -> ProcessFailure:
    """What torch's agent makes of a rank that raised `error`, or ended by itself."""
    file = folder / f"{rank}.json"
    if error:
        failing(error, file)
    return ProcessFailure(local_rank=rank, pid=1, exitcode=exitcode, error_file=str(file))


def test_without_a_launcher_a_fault_is_one_message_and_an_error_its_traceback() -> None:
    fault, error = failing("ValueError('no such file')"), failing("KeyError('gone')")
    assert (fault.returncode, fault.stderr) == (1, "error: no such file\n")
    assert error.returncode == 1
    assert error.stderr.startswith("Traceback")


def test_under_a_launcher_a_rank_leaves_its_words_to_it(tmp_path: Path) -> None:
    done = failing("KeyError('gone')", tmp_path / "error.json")
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "")
    message = json.loads((tmp_path / "error.json").read_text())["message"]
    assert message["message"] == "KeyError: 'gone'"
    assert message["extraInfo"]["py_callstack"].startswith("Traceback")


def test_a_fault_is_shown_as_it_is(tmp_path: Path) -> None:
    fault = {3: failure(tmp_path, "ValueError('no such file')")}
    assert first_failure(fault, name_host=False).text == "error: no such file"


def test_a_lost_peer_is_the_consequence_of_what_came_after_it(tmp_path: Path) -> None:
    lost = failure(tmp_path, "RuntimeError('[gloo/transport/tcp/pair.cc:5] Connection closed by peer')", rank=0)
    cause = failure(tmp_path, "KeyError('gone')", rank=1)
    shown = first_failure({0: lost, 1: cause}, name_host=False)
    assert not shown.lost_peer
    assert shown.text.splitlines()[-2:] == ["KeyError: 'gone'", "error: rank 1 failed first, with the error above"]
    assert first_failure({0: lost}, name_host=False).lost_peer


@pytest.mark.parametrize(
    ("exitcode", "said"),
    [
        (-9, "error: rank 1 was killed (SIGKILL), as the system does when memory runs out"),
        (-11, "error: rank 1 was ended by SIGSEGV"),
        (3, "error: rank 1 ended with exit code 3"),
    ],
)
def test_a_rank_that_left_no_word(tmp_path: Path, exitcode: int, said: str) -> None:
    ended_by_launcher = failure(tmp_path, None, exitcode=-15, rank=0)
    shown = first_failure({0: ended_by_launcher, 1: failure(tmp_path, None, exitcode, rank=1)}, name_host=False)
    assert shown.text.startswith(said)
