"""A run's export goes to a stand-in for the Hub, by the Hub's own client, with a card that tells what it is."""

import json
import threading
from base64 import b64decode
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.unit.certificate.test_certify import finished_run, write_small_text_model
from train.commands.main import main
from train.export.model_folder import write_random_model
from train.run_folder import RunFolder

TOKEN = "hf_" + "x" * 34


class Hub:
    """What a stand-in server was asked, and the files of the commits it took."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []
        self.created: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}
        self.uploads: dict[str, bytes] = {}
        self.tokens: set[str | None] = set()
        self.refuses = False


def handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def body(self) -> bytes:
            hub.asked.append((self.command, self.path))
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def answer(self, values: Any, status: int = 200) -> None:
            data = json.dumps(values).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_PUT(self) -> None:
            hub.uploads[self.path.rpartition("/")[2]] = self.body()
            self.answer({})

        def do_POST(self) -> None:
            body, here = self.body(), f"http://{self.headers['Host']}"
            hub.tokens.add(self.headers.get("Authorization"))
            if hub.refuses:
                self.answer({"error": "no room for you"}, 403)
            elif self.path == "/api/repos/create":
                hub.created.append(json.loads(body))
                self.answer({"url": f"{here}/me/kettles"})
            elif "/preupload/" in self.path:
                files = json.loads(body)["files"]
                mode = {True: "lfs", False: "regular"}
                answers = [{"path": f["path"], "uploadMode": mode[f["path"].endswith(".safetensors")]} for f in files]
                self.answer({"files": [one | {"shouldIgnore": False} for one in answers]})
            elif self.path.endswith("/info/lfs/objects/batch"):
                objects = [
                    one | {"actions": {"upload": {"href": f"{here}/upload/{one['oid']}"}}}
                    for one in json.loads(body)["objects"]
                ]
                self.answer({"transfer": "basic", "objects": objects})
            elif "/commit/" in self.path:
                for line in map(json.loads, body.decode().splitlines()):
                    value = line["value"]
                    if line["key"] == "file":
                        hub.files[value["path"]] = b64decode(value["content"])
                    elif line["key"] == "lfsFile":
                        hub.files[value["path"]] = hub.uploads[value["oid"]]
                self.answer({"commitUrl": f"{here}/me/kettles/commit/1", "commitOid": "1", "success": True})
            else:
                self.answer({"errors": [], "warnings": []})

    return Handler


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    found = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(found))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    # The client reads HF_ENDPOINT and HF_HUB_DISABLE_XET when it is imported.
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no_token"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    yield found
    server.shutdown()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A finished run that started from a folder with a card."""
    folder = tmp_path_factory.mktemp("runs") / "tiny_instruct"
    folder.mkdir()
    base = folder / "Kettle-1B"
    settings = write_small_text_model(folder, "tiny_instruct")
    write_random_model(settings, base, seed=0)
    (base / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: [en]\n---\n# Kettle\nThe base's own words.\n")
    words = [f"model.path={base}", "run.name=kettles", "optim.betas=[0.9,0.95]"]
    words += [f"data.eval={folder / 'records.jsonl'}", "eval.generate=false", "eval.every=0"]
    return finished_run(folder, settings, *words, media=False)


def test_all_files_arrive_with_a_card(run: RunFolder, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    main(["export", str(run.path), "--push", "me/kettles"])
    assert "/me/kettles" in capsys.readouterr().out
    assert hub.tokens == {f"Bearer {TOKEN}"}
    [created] = hub.created
    assert (created["name"], created["organization"], created["visibility"]) == ("kettles", "me", "private")
    assert [path for _, path in hub.asked if "/commit/" in path] == ["/api/models/me/kettles/commit/main"]
    files = {file.relative_to(run.export).as_posix(): file.read_bytes() for file in run.export.rglob("*")}
    assert hub.files | {"README.md": b""} == files | {"README.md": b""}
    assert any(name.endswith(".safetensors") for name in hub.files)

    card = hub.files["README.md"].decode()
    _, head, text = card.split("---", 2)
    assert yaml.safe_load(head) == {
        "library_name": "transformers",
        "tags": ["omnitune"],
        "base_model": "Kettle-1B",
        "license": "apache-2.0",
        "language": ["en"],
    }
    assert "# Kettle-1B, kettles" in text
    assert "**Licence of the base:** apache-2.0." in text
    assert "2 steps (full), stored as float32" in text
    assert "| records | 8 | trained on |" in text
    assert "| records | 8 | held out |" in text
    assert "| `optim.betas` | `[0.9, 0.95]` |" in text
    assert "| `data.max_tokens` | `512` |" in text
    assert "optim.eps" not in text
    last = [json.loads(line) for line in run.metrics.read_text().splitlines() if "eval/loss" in line][-1]
    assert f"| `eval/loss` | {last['eval/loss']:.4f} |" in text
    assert str(run.path.parent) not in card  # no path of this machine
    assert (run.export / "README.md").read_text().endswith("The base's own words.\n")


def test_a_public_repository_is_asked_for(run: RunFolder, hub: Hub) -> None:
    main(["export", str(run.path), "--push", "me/kettles", "--public"])
    assert [one["visibility"] for one in hub.created] == ["public"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--push", "me/kettles"], "there is no token for http://127.0.0.1:"),
        (["--push", "me/ket/tles"], "--push me/ket/tles: "),
        (["--push", "me/kettles", "--as", "llama", "--out", "x"], "leave out --as"),
    ],
)
def test_what_cannot_be_pushed_is_refused(
    words: list[str], said: str, run: RunFolder, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(SystemExit, match=said):
        main(["export", str(run.path), *words])
    assert hub.asked == []


def test_a_refusal_of_the_hub_is_a_message(run: RunFolder, hub: Hub) -> None:
    hub.refuses = True
    with pytest.raises(SystemExit, match=r"error: --push me/kettles: .*403"):
        main(["export", str(run.path), "--push", "me/kettles"])


def test_nothing_is_pushed_unasked(run: RunFolder, hub: Hub, tmp_path: Path) -> None:
    main(["export", str(run.path), "--out", str(tmp_path / "out")])
    assert hub.asked == []


def test_an_unknown_licence_is_said(run: RunFolder, hub: Hub) -> None:
    card = run.path.parent / "Kettle-1B" / "README.md"
    kept = card.read_text()
    card.write_text("no front matter")
    try:
        main(["export", str(run.path), "--push", "me/kettles"])
    finally:
        card.write_text(kept)
    assert "its folder does not say" in hub.files["README.md"].decode()
