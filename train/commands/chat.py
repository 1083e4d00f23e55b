"""Talk to a model, with images and audio clips: one question, or a conversation in the terminal."""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from train.errors import OmniTuneError
from train.run_folder import model_in

_HELP = """\
A line is a question; it goes with the files attached before it, and an empty line asks about them alone.
  /image PATH  attach an image       /reset  begin a new conversation
  /audio PATH  attach an audio clip     /quit   leave (Ctrl-D too); Ctrl-C stops an answer"""


_Answer = Callable[[list[dict[str, Any]]], Iterator[str]]
"""From a conversation to the pieces of its next turn."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's words."""
    parser.add_argument("model", type=Path, help="folder of a run, whose export/ is taken, or of a model")
    parser.add_argument(
        "text",
        nargs="?",
        default="",
        help="the question; may be left out where a recording asks it. Without any, a conversation begins",
    )
    parser.add_argument("--image", action="append", default=[], help="image file; may be given several times")
    parser.add_argument("--audio", action="append", default=[], help="audio file; may be given several times")
    parser.add_argument("--system", help="system turn in place of the model's own")
    long_audio_argument(parser)
    parser.add_argument("--search", type=Path, help="folder of texts (.txt, .md) that the model may search")
    generation_arguments(parser)


def long_audio_argument(parser: argparse.ArgumentParser) -> None:
    """Declare what becomes of long recordings."""
    parser.add_argument(
        "--long-audio",
        choices=["quarantine", "cut", "split"],
        help="what happens to an audio clip over 30 s, as data.long_audio in training (default: it is refused)",
    )


def generation_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare how answers are generated."""
    parser.add_argument("--max-new-tokens", type=int, default=512, help="tokens of an answer at most")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 = always the likeliest token")
    parser.add_argument("--top-p", type=float, help="draw from the likeliest tokens of this probability together")


def generation_options(chosen: argparse.Namespace) -> dict[str, Any]:
    """The options of `Chat.answer` that the words give."""
    if chosen.max_new_tokens < 1:
        raise OmniTuneError(f"--max-new-tokens is {chosen.max_new_tokens}; it must be at least 1")
    if not chosen.temperature >= 0:
        raise OmniTuneError(f"--temperature is {chosen.temperature}; it must be 0 or more")
    if chosen.top_p is not None and not 0 < chosen.top_p <= 1:
        raise OmniTuneError(f"--top-p is {chosen.top_p}; it must be above 0, and at most 1")
    return {"max_new_tokens": chosen.max_new_tokens, "temperature": chosen.temperature, "top_p": chosen.top_p}


def run(chosen: argparse.Namespace) -> None:
    """Print the answer as it is generated, or talk until the user leaves."""
    from train.inference.chat import Chat
    from train.inference.search import LocalSearch

    options = generation_options(chosen)
    chat = Chat.load(model_in(chosen.model), system_prompt=chosen.system, long_audio=chosen.long_audio)
    question = {"text": chosen.text, "image": chosen.image, "audio": chosen.audio}
    answer: _Answer = partial(chat.answer, **options)
    if chosen.search:
        answer = partial(_found_answer, partial(chat.answer_by_search, search=LocalSearch(chosen.search), **options))
    if any(question.values()):
        _print(answer([{"role": "user", "content": question}]))
    else:
        _Conversation(answer).talk()


def _found_answer(answer_by_search: Callable[..., Iterator[Any]], messages: list[dict[str, Any]]) -> Iterator[str]:
    """The answer; the searches before it are shown on the way."""
    for step in answer_by_search(messages):
        if isinstance(step, str):
            yield step
        else:
            print(f"searching for: {step.query}", file=sys.stderr)
            for number, found in enumerate(step.results, 1):
                print(f"  [{number}] {found.title}", file=sys.stderr)


def _print(pieces: Iterator[str]) -> str:
    """Print an answer as it comes; what was printed of it, since Ctrl-C stops it."""
    said = ""
    with suppress(KeyboardInterrupt):
        for piece in pieces:
            print(piece, end="", flush=True)
            said += piece
    print()
    if not said.strip():
        print("(the model gave no text: it ended its answer at once)", file=sys.stderr)
    return said


class _Conversation:
    """A conversation in the terminal: what was said, and what is attached to the next question."""

    def __init__(self, answer: _Answer):
        self._answer = answer
        self._reset()

    def _reset(self) -> None:
        self._messages: list[dict[str, Any]] = []
        self._attached: dict[str, list[str]] = {"image": [], "audio": []}

    def talk(self) -> None:
        """Take lines until the user leaves."""
        with suppress(ImportError):  # some builds of Python lack it
            import readline  # noqa: F401 (edits and remembers the lines of `input`)
        print(_HELP)
        while True:
            try:
                line = input("> ").strip()
            except KeyboardInterrupt:
                print()
                continue
            except EOFError:
                print()
                return
            if line in ("/quit", "/exit"):
                return
            try:
                self._take(line)
            except OmniTuneError as error:
                print(f"error: {error}")

    def _take(self, line: str) -> None:
        command, _, rest = line.partition(" ")
        if command in ("/image", "/audio"):
            path = Path(rest.strip().strip("'\"")).expanduser()
            if not path.is_file():
                raise OmniTuneError(f"there is no file '{path}'; nothing is attached")
            self._attached[command[1:]].append(str(path))
        elif command == "/reset":
            self._reset()
        elif command.startswith("/"):
            print(_HELP)
        elif line or any(self._attached.values()):
            self._ask({"text": line, **self._attached})

    def _ask(self, question: dict[str, Any]) -> None:
        """Answer; a question that cannot be answered leaves the conversation as it was before its files came."""
        self._attached = {"image": [], "audio": []}
        asked = [*self._messages, {"role": "user", "content": question}]
        said = _print(self._answer(asked))
        if said.strip():
            self._messages = [*asked, {"role": "assistant", "content": said}]
