"""A model folder in the real vLLM on the CPU: its offline API and its server say what our own model says."""

import json
import os
import signal
import socket
import subprocess
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
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

from tests.builders import randomize
from tests.end_to_end import agreement
from tests.runs import (
    ROOT,
    SAMPLE,
    build_here,
    clean_environment,
    environment_python,
    trained_model,
    write_small_model,
)
from tests.unit.certificate.test_certify import LORA, finished_run
from tests.unit.data.builders import by_av, tone
from train.certificate.exported import export_lines
from train.commands.main import main
from train.commands.options import read_options
from train.export.model_folder import copy_side_files
from train.families.registry import find
from train.modules.packed import PackedModel
from train.sources import load_processor, open_records

pytestmark = [pytest.mark.end_to_end, pytest.mark.timeout(1200)]

TOLERANCE = 1e-4
BLOCK = 32
"""Tokens of a block of the prefix cache in vllm_answers.py."""

IMAGE = SAMPLE / "images" / "heldout" / "0001.png"
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


def image(height: int, width: int, *channels: int, depth: type = np.uint8) -> bytes:
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


def item(part: bytes | Path | str) -> dict[str, Any]:
    """Text, or a file that its ending or its first bytes tell, as an item of a message in the OpenAI form."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    is_sound = part.suffix == ".opus" if isinstance(part, Path) else part.startswith(b"RIFF")
    kind, encoded = ("audio", "audio/wav") if is_sound else ("image", "image/png")
    data = b64encode(part if isinstance(part, bytes) else part.read_bytes()).decode()
    return {"type": f"{kind}_url", f"{kind}_url": {"url": f"data:{encoded};base64,{data}"}}


def said(role: str, *parts: bytes | Path | str) -> dict[str, Any]:
    return {"role": role, "content": [item(part) for part in parts]}


def in_openai_form(message: dict[str, Any]) -> dict[str, Any]:
    """A message of the sample as a request has it: images, recordings, text."""
    content = message["content"]
    if isinstance(content, str):
        return message
    files = [content.get(kind, []) for kind in ("image", "audio")]
    media = [Path(file) for some in files for file in (some if isinstance(some, list) else [some])]
    return said(message["role"], *media, *filter(None, [content.get("text")]))


def held_out() -> list[list[dict[str, Any]]]:
    return [[in_openai_form(message) for message in messages] for messages in agreement.held_out()]


def mixed() -> list[list[dict[str, Any]]]:
    """Slices, several media of unequal size, the same image again under another number, and media of other kinds."""
    wide, small = image(140, 330, 3), image(120, 90, 3)
    short, long = clip(0.31), clip(1.7, rate=24_000, channels=2)
    transparent, deep = image(50, 60, 4), image(60, 50, depth=np.uint16)
    return [
        [said("user", wide, small, ") What is new?")],
        [said("user", small, wide, small, "\nWhich?")],
        [said("user", long, short, " And now?")],
        [said("user", small, long, "What?"), said("assistant", "blue"), said("user", wide, short, "And this?")],
        [said("system", "Short."), said("user", "First", small, "then", short, "last")],
        [said("user", transparent, deep, "What?")],
    ]


def texts() -> list[list[dict[str, Any]]]:
    """A system turn, several turns, other alphabets."""
    first, answer = said("user", "What is the opposite of hot?"), said("assistant", "cold")
    return [[first], [said("system", "Answer in one word."), first], [first, answer, said("user", "再说一遍 piano.")]]


def check_agreement(
    python: Path,
    export: Path,
    model: Any,
    processor: Any,
    conversations: list[list[dict[str, Any]]],
    folder: Path,
    **options: str,
) -> None:
    """Insist that vLLM's offline API gives for the export the tokens and log-probabilities of the model.

    options: those of the processor that vLLM is started with.
    """
    asked, answered = folder / "asked.json", folder / "answered.json"
    asked.write_text(json.dumps(conversations))
    script = ROOT / "tests" / "end_to_end" / "vllm_answers.py"
    command = [python, script, export, asked, answered, str(agreement.NEW_TOKENS), json.dumps(options)]
    done = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]

    expected = agreement.answers(model, processor, conversations)
    for found, own in zip(json.loads(answered.read_text()), expected, strict=True):
        assert found["prompt_ids"] == own["prompt"]
        assert found["ids"] == found["cached_ids"] == own["greedy"]
        assert len(own["greedy"]) == agreement.NEW_TOKENS
        by_own_model = pytest.approx(own["log_probabilities"], abs=TOLERANCE)
        assert found["prompt_logprobs"] + found["logprobs"] == by_own_model
        assert found["prompt_logprobs"] + found["cached_logprobs"] == by_own_model
        assert found["cached_tokens"] == (len(own["prompt"]) - 1) // BLOCK * BLOCK  # the last token is computed


def test_the_offline_api_agrees_with_our_model(python: Path, model: Path, tmp_path: Path) -> None:
    """A recording of 95 s, with clips around it, in windows as everywhere."""
    family = find(model)
    processor = family.load_processor(model)
    processor.long_audio = "split"
    short, long = clip(0.31), clip(95)
    split = [[said("user", short, long, clip(1.7), "What?"), said("assistant", "blue"), said("user", short, "And?")]]
    conversations = [*mixed(), *split]
    check_agreement(
        python, model, family.load_model(model).eval(), processor, conversations, tmp_path, long_audio="split"
    )


@pytest.mark.parametrize(
    ("words", "conversations"),
    [
        pytest.param(["+recipe=full"], held_out, id="omni-full"),
        pytest.param(["+recipe=lora"], held_out, id="omni-lora"),
        pytest.param(["model=tiny_qwen_omni"], held_out, id="qwen-omni"),
        pytest.param(["model=tiny_instruct", "data=text"], texts, id="instruct-full"),
        pytest.param(["model=tiny_minicpm", "data=text", "lora=lora"], texts, id="minicpm-lora"),
    ],
)
def test_exports_say_what_was_trained(
    words: list[str], conversations: Callable[[], list[list[dict[str, Any]]]], python: Path, tmp_path: Path
) -> None:
    few = ["run.max_steps=3", "checkpoint.save_every=0", "data.eval=[]", f"run.dir={tmp_path / 'run'}"]
    run = build_here([*words, *few])
    run.trainer.fit()
    trained = trained_model(run)
    export = run.export()
    check_agreement(python, export, trained, run.records.processor, conversations(), tmp_path)


def test_a_certificate_looks_at_vllm_and_finds_a_fault(
    python: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    folder = tmp_path / "tiny"
    folder.mkdir()
    run = finished_run(folder, write_small_model(folder), *LORA, media=True)
    options = read_options(run.config)
    records = open_records(options, options.data.train, load_processor(options, find(run.export), run.export))
    line = export_lines(options, run.initial_model, run, records, python)[2]
    assert line.passed, line.why
    assert line.figure is not None
    assert line.figure > 0
    logits = PackedModel.logits  # the planted fault: what is computed here is not what vLLM computes
    monkeypatch.setattr(PackedModel, "logits", lambda self, batch: logits(self, batch) * 1.001)
    line = export_lines(options, run.initial_model, run, records, python)[2]
    assert line.passed is False
    assert "log-probabilities" in line.why


@pytest.fixture(scope="module")
def server(python: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the OpenAI-compatible server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--served-model-name", "tiny"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    # vLLM lets no request set options of the processor, unless it is told to trust them; ours never does.
    command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "2048", "--trust-request-mm-kwargs"]
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


def post(address: str, content: Any, **more: Any) -> tuple[int, str]:
    """Status, and the answer or the error's message; `more` joins the request."""
    request = {"model": "tiny", "messages": [{"role": "user", "content": content}], "max_tokens": 12, "temperature": 0}
    request |= more
    body, headers = json.dumps(request).encode(), {"Content-Type": "application/json"}
    try:
        with urlopen(Request(f"{address}/v1/chat/completions", body, headers), timeout=120) as response:
            return response.status, whole(json.load(response)["choices"][0]["message"]["content"])
    except HTTPError as error:
        return error.code, json.load(error)["error"]["message"]


def spoken(file: bytes, form: str) -> dict[str, Any]:
    return {"type": "input_audio", "input_audio": {"data": b64encode(file).decode(), "format": form}}


def chat(capsys: pytest.CaptureFixture[str], model: Path, *words: str | Path) -> str:
    main(["chat", str(model), *map(str, words), "--max-new-tokens", "12"])
    return whole(capsys.readouterr().out)


def test_the_server_says_what_omnitune_chat_says(
    server: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = chat(capsys, model, "--image", IMAGE, "--audio", CLIP, QUESTION)
    assert post(server, [item(IMAGE), item(CLIP), item(QUESTION)]) == (200, answer)
    assert post(server, [item(IMAGE), spoken(CLIP.read_bytes(), "ogg"), item(QUESTION)]) == (200, answer)

    surround = tmp_path / "surround.m4a"
    surround.write_bytes(by_av(tone(1.0, 48_000, channels=8), 48_000, "mp4", "aac"))
    heard = chat(capsys, model, "--audio", surround, QUESTION)
    assert post(server, [spoken(surround.read_bytes(), "m4a"), item(QUESTION)]) == (200, heard)

    plain = chat(capsys, model, QUESTION)
    assert plain not in (answer, heard)
    assert post(server, [item(QUESTION)]) == post(server, QUESTION) == (200, plain)


def test_what_cannot_be_used_is_refused_with_its_reason(server: str) -> None:
    faults = [
        ([item(IMAGE.read_bytes()[:100]), item(QUESTION)], "image file is truncated"),
        ([item(b"no image"), item(QUESTION)], "cannot identify image file"),
        ([item(b"RIFF, and no recording"), item(QUESTION)], "is no recording that can be read"),
        ([spoken(clip(0.001), "wav")], "audio of 16 samples is too short to be heard"),
        ([spoken(clip(30.5), "wav")], "audio of 30.5 s is longer than 30 s"),
        ([item(IMAGE)] * 300 + [item(QUESTION)], "maximum context length is 2048 tokens"),
    ]
    for content, reason in faults:
        status, message = post(server, content)
        assert status == 400
        assert reason in message
    for name, value in {"subfolder": "../elsewhere", "cache_dir": "/tmp", "long_audio": "cut"}.items():
        status, message = post(server, [item(IMAGE), item(QUESTION)], mm_processor_kwargs={name: value})
        assert status == 400
        assert f"mm_processor_kwargs has '{name}', which a request may not set" in message
    assert post(server, QUESTION)[0] == 200
