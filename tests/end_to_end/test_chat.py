"""`omnitune chat` without a question: a conversation in the terminal."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import ROOT, SAMPLE, clean_environment, write_endless_model
from train.commands.main import main

pytestmark = pytest.mark.end_to_end


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_endless_model(tmp_path_factory.mktemp("chat"))


class Terminal:
    """A user at the terminal: types lines, and reads what comes."""

    def __init__(self, *words: str | Path):
        command = [sys.executable, "-u", "-m", "train.commands.main", "chat", *map(str, words)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, cwd=ROOT, env=clean_environment(), stdin=pipe, stdout=pipe)

    def type(self, *lines: str) -> None:
        assert self.process.stdin
        self.process.stdin.write("".join(f"{line}\n" for line in lines).encode())
        self.process.stdin.flush()

    def read(self, pattern: str) -> str:
        """What comes up to a match of the pattern."""
        assert self.process.stdout
        said = b""
        while not re.search(pattern.encode(), said):
            piece = os.read(self.process.stdout.fileno(), 1)
            assert piece, said.decode(errors="replace")
            said += piece
        return said.decode(errors="replace")


@pytest.mark.timeout(180)
def test_a_conversation(endless: Path, tmp_path: Path) -> None:
    terminal = Terminal(endless, "--temperature", "1.5", "--max-new-tokens", "100000")
    assert "/image PATH" in terminal.read("> ")
    terminal.type("/image nowhere.png")
    terminal.read("error: there is no file 'nowhere.png'; nothing is attached\n> ")
    broken = tmp_path / "broken image.png"
    broken.write_text("This is no image.")
    terminal.type(f"/image '{broken}'")
    terminal.read("> ")
    terminal.type("What is it?")
    terminal.read(rf"error: image '{broken}': it begins with .*\n> ")
    terminal.type(f"/image {SAMPLE}/images/heldout/0001.png", f"/audio {SAMPLE}/audio/heldout/0001.opus", "")
    terminal.read(r"> > [\s\S]{40}")
    terminal.process.send_signal(signal.SIGINT)
    terminal.read("\n> ")
    terminal.type("And now?")
    terminal.read(r"[\s\S]{40}")
    terminal.process.send_signal(signal.SIGINT)
    terminal.read("\n> ")
    terminal.type("/help")
    assert "/reset" in terminal.read("> ")
    terminal.type("/reset", "/quit")
    assert terminal.process.wait(timeout=30) == 0


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (["--temperature", "-1"], "--temperature is -1.0; it must be 0 or more"),
        (["--top-p", "0"], "--top-p is 0.0; it must be above 0, and at most 1"),
        (["--max-new-tokens", "0"], "--max-new-tokens is 0; it must be at least 1"),
        (["--image", "nowhere.png"], "image 'nowhere.png' not found; fix the path"),
    ],
)
def test_faults_end_in_a_message(endless: Path, words: list[str], fault: str) -> None:
    with pytest.raises(SystemExit, match=r"^error: ") as error:
        main(["chat", str(endless), "Hello", *words])
    assert fault in str(error.value)
