"""Talk to a model in the browser: a page with upload, microphone and sampling controls."""

import argparse
from pathlib import Path

from train.commands.chat import generation_arguments, generation_options, long_audio_argument
from train.errors import OmniTuneError
from train.run_folder import model_in


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's words."""
    parser.add_argument("model", type=Path, help="folder of a run, whose export/ is taken, or of a model")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 = all of this machine's")
    parser.add_argument("--port", type=_port, help="default: the first free one from 7860 on")
    parser.add_argument("--share", action="store_true", help="also a public link, through Gradio's servers")
    parser.add_argument("--system", help="system turn in place of the model's own")
    long_audio_argument(parser)
    generation_arguments(parser)


def run(chosen: argparse.Namespace) -> None:
    """Serve the page until Ctrl-C."""
    from train.inference.chat import Chat

    try:
        from train.inference.demo import page, serve
    except ModuleNotFoundError as error:
        raise OmniTuneError(f"the demo needs Gradio ({error}); install it: pip install 'omnitune[demo]'") from None

    options = generation_options(chosen)
    chat = Chat.load(model_in(chosen.model), system_prompt=chosen.system, long_audio=chosen.long_audio)
    serve(
        page(chat, title=f"OmniTune: {chosen.model}", **options), host=chosen.host, port=chosen.port, share=chosen.share
    )


def _port(word: str) -> int:
    if not (word.isascii() and word.isdecimal() and 0 < int(word) < 2**16):
        raise argparse.ArgumentTypeError(f"{word} is no port; they go from 1 to 65535")
    return int(word)
