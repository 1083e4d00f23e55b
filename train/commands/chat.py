"""Ask a model one question, with pictures and recordings."""

import argparse
import sys
from pathlib import Path


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's words."""
    parser.add_argument("model", type=Path, help="model folder, such as a run's export/")
    parser.add_argument("text", nargs="?", default="", help="the question; may be left out where a recording asks it")
    parser.add_argument("--image", action="append", default=[], help="picture file; may be given several times")
    parser.add_argument("--audio", action="append", default=[], help="audio file; may be given several times")
    parser.add_argument("--system", help="system turn in place of the model's own")
    parser.add_argument("--max-new-tokens", type=int, default=512, help="tokens of the answer at most")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 = always the likeliest token")


def run(chosen: argparse.Namespace) -> None:
    """Print the answer."""
    from train.errors import OmniTuneError
    from train.inference.chat import Chat

    if not (chosen.text or chosen.audio or chosen.image):
        raise OmniTuneError("nothing is asked: give a text, --audio or --image")
    chat = Chat.load(chosen.model, system_prompt=chosen.system)
    media = {kind: [str(Path(path).absolute()) for path in getattr(chosen, kind)] for kind in ("image", "audio")}
    content = {"text": chosen.text, **media}
    answer = chat.ask(
        [{"role": "user", "content": content}],
        max_new_tokens=chosen.max_new_tokens,
        temperature=chosen.temperature,
    )
    print(answer, file=sys.stdout)
