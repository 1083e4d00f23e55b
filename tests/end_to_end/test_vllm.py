"""A model folder in the real vLLM on the CPU: its offline API and its server say what our own model says."""

import json
import os
import signal
import socket
import subprocess
import time
from base64 import b64encode
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from tests.answers import openai_messages, own_answers
from tests.builders import randomize
from tests.runs import ROOT, SAMPLE, build_here, clean_environment, environment_python
from train.commands.main import main
from train.data.records import parse_record
from train.families import find
from train.inference.export import copy_side_files
from train.schema import Part, Record, Turn

pytestmark = [pytest.mark.end_to_end, pytest.mark.timeout(1200)]

RECORDS = {"speech": 4, "typed_picture": 4, "spoken_picture": 4, "turns": 3, "text": 2, "pictures": 3}
MAX_TOKENS = 8
TOLERANCE = 1e-4
BLOCK = 32
"""Tokens of a block of the prefix cache in vllm_answers.py."""

PICTURE = SAMPLE / "images" / "heldout" / "0001.png"
CLIP = SAMPLE / "audio" / "heldout" / "0001.opus"
QUESTION = "What color is the object?"


@pytest.fixture(scope="module")
def python() -> Path:
    return environment_python("vllm")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random tiny model in two shards; nothing of it is what an initialisation would make."""
    folder = tmp_path_factory.mktemp("vllm") / "export"
    settings = ROOT / "data" / "tiny"
    omni = find(settings).random_model(settings, seed=0)
    torch.manual_seed(0)
    randomize(omni)
    omni.audio.audio.positional_embedding.normal_(std=0.3)
    omni.save_pretrained(folder, max_shard_size="7MB")
    copy_side_files(settings, folder)
    assert len(list(folder.glob("*.safetensors"))) == 2
    return folder


def environment() -> dict[str, str]:
    """Variables for vLLM: little memory, this checkout as the plugin, and no compiler, which would take longer."""
    return clean_environment() | {
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "TORCH_COMPILE_DISABLE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
    }


def held_out() -> list[Record]:
    """Prompts of held-out records, so many of each type."""
    left = dict(RECORDS)
    prompts = []
    for line in (SAMPLE / "heldout.jsonl").read_text(encoding="utf-8").splitlines():
        record = parse_record(json.loads(line), root=SAMPLE, file="heldout.jsonl", line=1)
        if left[record.type]:
            left[record.type] -= 1
            prompts.append(Record(record.turns[:-1]))
    assert len(prompts) == sum(RECORDS.values()) == 20
    return prompts


def picture(height: int, width: int, *channels: int, depth: type = np.uint8) -> bytes:
    """A PNG of random pixels."""
    pixels = np.random.default_rng(height).integers(0, np.iinfo(depth).max, (height, width, *channels), dtype=depth)
    file = BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def clip(seconds: float, rate: int = 16_000, channels: int = 1) -> bytes:
    """A WAV of noise."""
    random = np.random.default_rng(rate)
    file = BytesIO()
    soundfile.write(file, random.uniform(-0.5, 0.5, (int(seconds * rate), channels)), rate, format="WAV")
    return file.getvalue()


def ask(*parts: Part | str) -> Turn:
    return Turn("user", tuple(Part("text", part) if isinstance(part, str) else part for part in parts))


def mixed() -> list[Record]:
    """Slices, several media of unequal size, the same picture again under another number, and media of other kinds."""
    wide, small = Part("image", picture(140, 330, 3)), Part("image", picture(120, 90, 3))
    short, long = Part("audio", clip(0.31)), Part("audio", clip(1.7, rate=24_000, channels=2))
    transparent, deep = Part("image", picture(50, 60, 4)), Part("image", picture(60, 50, depth=np.uint16))
    return [
        Record((ask(wide, small, ") What is new?"),)),
        Record((ask(small, wide, small, "\nWhich?"),)),
        Record((ask(long, short, " And now?"),)),
        Record((ask(small, long, "What?"), Turn("assistant", (Part("text", "blue"),)), ask(wide, short, "And this?"))),
        Record((Turn("system", (Part("text", "Short."),)), ask("First", small, "then", short, "last"))),
        Record((ask(transparent, deep, "What?"),)),
    ]


def check_agreement(python: Path, model: Path, conversations: list[Record], folder: Path) -> None:
    """Insist that the offline API gives the tokens and log-probabilities of our own model."""
    asked, answered = folder / "asked.json", folder / "answered.json"
    asked.write_text(json.dumps([openai_messages(conversation) for conversation in conversations]))
    script = ROOT / "tests" / "end_to_end" / "vllm_answers.py"
    command = [python, script, model, asked, answered, str(MAX_TOKENS)]
    done = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]

    family = find(model)
    expected = own_answers(family.load_model(model).eval(), family.load_processor(model), conversations, MAX_TOKENS)
    for found, own in zip(json.loads(answered.read_text()), expected, strict=True):
        assert found["prompt_ids"] == own["prompt_ids"]
        assert found["ids"] == found["cached_ids"] == own["ids"]
        for name in ("prompt_logprobs", "logprobs"):
            assert found[name] == pytest.approx(own[name], abs=TOLERANCE)
        assert found["cached_logprobs"] == pytest.approx(own["logprobs"], abs=TOLERANCE)
        assert found["cached_tokens"] == (len(own["prompt_ids"]) - 1) // BLOCK * BLOCK  # the last token is computed
    assert sum(len(own["ids"]) for own in expected) > len(expected) * MAX_TOKENS / 2


def test_the_offline_api_agrees_with_our_model(python: Path, model: Path, tmp_path: Path) -> None:
    check_agreement(python, model, held_out() + mixed(), tmp_path)


@pytest.mark.parametrize(("tiny", "tuning"), [("tiny_instruct", "none"), ("tiny_minicpm", "lora")])
def test_exports_of_text_models_agree(tiny: str, tuning: str, python: Path, tmp_path: Path) -> None:
    """Served by vLLM's own classes; prompts with a system turn, several turns and other alphabets."""
    words = [f"model={tiny}", "data=text", "data.eval=[]", f"lora={tuning}", f"run.dir={tmp_path / 'run'}"]
    # Slow enough that answers do not yet end at once: the end is what three steps learn first.
    run = build_here([*words, "run.max_steps=3", "run.save_every=0", "modules.lr.llm=1e-4"])
    run.trainer.fit()
    first, answer = ask("What is the opposite of hot?"), Turn("assistant", (Part("text", "cold"),))
    system = Turn("system", (Part("text", "Answer in one word."),))
    conversations = [Record((first,)), Record((system, first)), Record((first, answer, ask("再说一遍 piano.")))]
    check_agreement(python, run.export(), conversations, tmp_path)


@pytest.fixture(scope="module")
def server(python: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the OpenAI-compatible server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--served-model-name", "tiny"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "2048"]
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            command, env=environment(), cwd=ROOT, stdout=output, stderr=output, start_new_session=True
        )
    try:
        address = f"http://127.0.0.1:{port}"
        while not is_ready(address):
            assert process.poll() is None, log.read_text()[-6000:]
            time.sleep(0.5)
        yield address
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def is_ready(address: str) -> bool:
    try:
        return urlopen(f"{address}/health", timeout=5).status == 200
    except (URLError, OSError):
        return False


def whole(text: str) -> str:
    """The text without the character that the limit of tokens cut through, which vLLM holds back."""
    return text.strip().rstrip("\N{REPLACEMENT CHARACTER}").strip()


def post(address: str, content: Any) -> tuple[int, str]:
    """Status, and the answer or the error's message."""
    request = {"model": "tiny", "messages": [{"role": "user", "content": content}], "max_tokens": 12, "temperature": 0}
    body, headers = json.dumps(request).encode(), {"Content-Type": "application/json"}
    try:
        with urlopen(Request(f"{address}/v1/chat/completions", body, headers), timeout=120) as response:
            return response.status, whole(json.load(response)["choices"][0]["message"]["content"])
    except HTTPError as error:
        return error.code, json.load(error)["error"]["message"]


def items(*parts: Part | str) -> list[dict[str, Any]]:
    [message] = openai_messages(Record((ask(*parts),)))
    return message["content"]


def spoken(file: bytes, form: str) -> dict[str, Any]:
    return {"type": "input_audio", "input_audio": {"data": b64encode(file).decode(), "format": form}}


def chat(capsys: pytest.CaptureFixture[str], model: Path, *words: str | Path) -> str:
    main(["chat", str(model), *map(str, words), "--max-new-tokens", "12"])
    return whole(capsys.readouterr().out)


def test_the_server_says_what_omnitune_chat_says(server: str, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = chat(capsys, model, "--image", PICTURE, "--audio", CLIP, QUESTION)
    seen, heard = Part("image", str(PICTURE)), Part("audio", str(CLIP))
    assert post(server, items(seen, heard, QUESTION)) == (200, answer)
    in_openai_form = [*items(seen), spoken(CLIP.read_bytes(), "ogg"), *items(QUESTION)]
    assert post(server, in_openai_form) == (200, answer)

    plain = chat(capsys, model, QUESTION)
    assert plain != answer
    assert post(server, items(QUESTION)) == post(server, QUESTION) == (200, plain)


def test_what_cannot_be_used_is_refused_with_its_reason(server: str) -> None:
    broken = Part("image", PICTURE.read_bytes()[:100])
    faults = [
        (items(broken, QUESTION), "image file is truncated"),
        (items(Part("image", b"no picture"), QUESTION), "cannot identify image file"),
        (items(Part("audio", b"no recording"), QUESTION), "corrupted audio data"),
        ([spoken(clip(0.001), "wav")], "audio of 16 samples is too short to be heard"),
        ([spoken(clip(30.5), "wav")], "audio of 30.5 s is longer than 30 s"),
        (items(*[Part("image", str(PICTURE))] * 300), "maximum context length is 2048 tokens"),
    ]
    for content, reason in faults:
        status, message = post(server, content)
        assert status == 400
        assert reason in message
    assert post(server, QUESTION)[0] == 200
