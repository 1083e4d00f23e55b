"""A page to talk to a model in the browser: images, recordings, the microphone, answers as they are generated."""

import mimetypes
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import gradio as gr

from train.errors import OmniTuneError
from train.inference.chat import Chat

_KEEP_UPLOADS_S = 24 * 3600


def page(chat: Chat, *, title: str, max_new_tokens: int, temperature: float, top_p: float | None) -> gr.Blocks:
    """The page; the sampling options are what its controls begin with."""

    def answer(
        question: dict[str, Any],
        history: list[dict[str, Any]],
        system: str,
        temperature: float,
        top_p: float,
        most: int,
    ) -> Iterator[str | gr.ChatMessage]:
        """The answer so far, each time it has grown; Gradio closes this iterator when the user stops it."""
        messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system.strip() else []
        messages += said(history)
        messages.append({"role": "user", "content": _content(question["text"], question["files"])})
        text = ""
        try:
            for piece in chat.answer(messages, max_new_tokens=most, temperature=temperature, top_p=top_p):
                text += piece
                yield text
        except OmniTuneError as error:
            # Where the server keeps uploads is no matter of the page's.
            yield _notice("This cannot be answered", re.sub(r"'/[^']*/([^/']+)'", r"'\1'", str(error)))
        else:
            if not text.strip():
                yield _notice("No answer", "The model ended its turn without a word.")

    sources: list[Literal["upload", "microphone"]] = ["upload"] if chat.media else []
    sources += ["microphone"] if "audio" in chat.media else []
    question = gr.MultimodalTextbox(
        placeholder="Ask something" + ("; files may go with it" if chat.media else ""),
        file_count="multiple",
        file_types=sorted(chat.media) or None,
        sources=sources,
        show_label=False,
        stop_btn=True,
    )
    top_p = top_p or chat.model.generation_config.top_p or 1.0
    longest = max(chat.model.config.max_position_embeddings, max_new_tokens)
    return gr.ChatInterface(
        answer,
        multimodal=True,
        chatbot=gr.Chatbot(show_label=False, height="65vh", buttons=["copy"]),
        textbox=question,
        title=title,
        additional_inputs=[
            gr.Textbox("", label="System prompt", placeholder="the model's own", lines=2),
            gr.Slider(0, 2, temperature, step=0.05, label="Temperature (0: always the likeliest token)"),
            gr.Slider(0.05, 1, top_p, step=0.05, label="Top p"),
            gr.Slider(1, longest, max_new_tokens, step=1, label="Tokens of an answer at most"),
        ],
        additional_inputs_accordion=gr.Accordion("System prompt and sampling", open=False),
        analytics_enabled=False,
        delete_cache=(3600, _KEEP_UPLOADS_S),
    )


def serve(blocks: gr.Blocks, *, host: str, port: int | None, share: bool) -> None:
    """Show the page until Ctrl-C; OmniTuneError if the port is taken."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        _, here, public = blocks.launch(
            server_name=host,
            server_port=port,
            share=share,
            ssr_mode=False,
            footer_links=[],
            quiet=True,
            prevent_thread_lock=True,
        )
    except OSError as error:
        raise OmniTuneError(
            f"the page cannot be served on {host}, port {port} ({error}); choose another port"
        ) from None
    print(f"the page is at {here}; Ctrl-C ends it")
    if share:
        print(f"its public link is {public}" if public else "Gradio's servers gave no public link")
    blocks.block_thread()


def said(history: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The page's messages in the form of `MegrezO.chat`, without questions that ended in a notice."""
    messages: list[dict[str, Any]] = []
    for message in history:
        if message.get("metadata"):
            messages.pop()
            continue
        texts = [item["text"] for item in message["content"] if item["type"] == "text"]
        files = [item["file"]["path"] for item in message["content"] if item["type"] == "file"]
        messages.append({"role": message["role"], "content": _content("\n".join(texts), files)})
    return messages


def _content(text: str, files: Sequence[str]) -> dict[str, Any]:
    """Images by their names; what is none is taken for a recording."""
    kinds = [
        "image" if (mimetypes.guess_type(path, strict=False)[0] or "").startswith("image/") else "audio"
        for path in files
    ]
    media = {kind: [path for path, its in zip(files, kinds, strict=True) if its == kind] for kind in ("image", "audio")}
    return {"text": text, **media}


def _notice(title: str, text: str) -> gr.ChatMessage:
    """A message of the page's own, which is no part of the conversation."""
    return gr.ChatMessage(role="assistant", content=text, metadata={"title": title})
