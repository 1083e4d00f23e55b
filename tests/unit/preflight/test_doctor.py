"""What the doctor finds: each fault of a folder of broken records, equal records, a damaged model folder."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.runs import ROOT, write_small_model
from tests.unit.data.builders import png, wav
from tests.unit.data.test_wrong_data import BAD_MEDIA, asks
from train.commands.main import main
from train.commands.options import compose_options
from train.data import workers
from train.engine.build_data import length_cache
from train.export.model_folder import write_random_model
from train.preflight.doctor import Report, as_text, examine_run
from train.preflight.examine import examine
from train.preflight.prepare import prepare

LINES: list[tuple[Any, str]] = [
    (b"{", "invalid JSON"),
    (b"\xff\xfe\xfd", "invalid|UTF-8|utf-8"),
    (b"[1, 2]", "a JSON object was expected"),
    (b'{"messages": [], "messages": []}', "stands twice"),
    (b'{"n": NaN}', "NaN"),
    (b'{"n": Infinity}', "Infinity"),
    (b'{"n": ' + b"9" * 5000 + b"}", "invalid JSON"),
    (b'{"n": ' + b"[" * 900 + b"]" * 900 + b"}", "invalid JSON|nested|no turns"),
    ({"conversations": []}, "no turns|empty|holds"),
    ({"messages": [{"role": "user", "content": "a"}]}, "assistant"),
    ({"messages": [{"role": "king", "content": "a"}, {"role": "assistant", "content": "b"}]}, "role"),
    ({"messages": [{"role": "user", "content": 3}, {"role": "assistant", "content": "b"}]}, "content|turn 1"),
    ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]}, "empty|turn 2"),
    ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]}, "weight"),
    ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 1e9}]}, "weight"),
    ({"messages": [{"role": "user", "content": "a"}] * 5000}, "4096"),
    (asks(text="a" * (2**20 + 1)), "1048576"),
    (asks(text="a" * 9000), "tokens, more than"),
    (asks(text="\ud800"), "surrogate|encoded|ud800"),
    (asks(text="a") | {"type": "x" * 101}, "is no short word"),
    (asks(text="a", picture="a.png"), "unknown key"),
    (asks(image="../a.png"), "leaves|outside|under"),
    (asks(image="/etc/hostname"), "leaves|outside|under"),
    (asks(image="link.png"), "leaves|outside|under"),
    (asks(image="."), "lies outside"),
    (asks(image="pipe"), "regular file"),
    (asks(image="none.png"), "not found"),
    (asks(image="http://localhost/a.png"), "is a URL"),
    (asks(image="file:///etc/passwd"), "is a URL"),
    (asks(image="s3://b/a.png"), "is a URL"),
    (asks(image="data:image/png,x"), "base64"),
    (asks(image="data:image/png;base64,AAAA"), "embedded image"),
]


def write_broken(folder: Path) -> list[str]:
    """Fifty records broken in the ways that data/README.md lists, and two good ones; a pattern of each reason."""
    lines = [(json.dumps(line).encode() if not isinstance(line, bytes) else line, why) for line, why in LINES]
    os.mkfifo(folder / "pipe")
    (folder / "link.png").symlink_to("/etc/hostname")
    for number, (kind, data, why) in enumerate(BAD_MEDIA):
        (folder / f"{number}-medium").write_bytes(data)
        lines.append((json.dumps(asks(**{kind: f"{number}-medium"})).encode(), why))
    lines = lines[:50]
    (folder / "a.png").write_bytes(png(30, 30))
    good = [json.dumps(asks(text="a", image="a.png")).encode(), json.dumps(asks(text="b")).encode()]
    (folder / "records.jsonl").write_bytes(b"\n".join([line for line, _ in lines] + good))
    assert len(lines) == 50
    return [why for _, why in lines]


def look(folder: Path, *words: str) -> Report:
    given = [f"data.train={folder / 'records.jsonl'}", f"data.cache={folder / 'cache'}", *words]
    return examine_run(compose_options(["data=files", "tracker=none", "data.workers=0", *given])[0])


def test_fifty_broken_records_are_each_named(tmp_path: Path) -> None:
    reasons = write_broken(tmp_path)
    report = look(tmp_path)
    assert [note["line"] for note in report.bad] == list(range(1, 51))
    for note, why in zip(report.bad, reasons, strict=True):
        assert re.search(why, note["reason"], re.DOTALL), note["reason"]
    assert report.exit_code == 1
    assert "50 of 52 records cannot be used" in report.faults[-1]
    assert report.sources[0]["usable"] == 2
    json.dumps(report.values())
    assert "training would be refused" in as_text(report)


def write_good(folder: Path, count: int) -> None:
    for number in range(count):
        (folder / f"{number}.png").write_bytes(png(20, 20 + number % 50))
    lines = [json.dumps(asks(text=f"{number}", image=f"{number}.png")) for number in range(count)]
    (folder / "records.jsonl").write_text("\n".join(lines))


def test_a_few_bad_records_are_left_out(tmp_path: Path) -> None:
    write_good(tmp_path, 8)
    (tmp_path / "3.png").write_bytes(b"")
    report = look(tmp_path)
    assert (report.exit_code, len(report.bad), report.faults) == (3, 1, [])
    assert "'" + str(tmp_path / "3.png") in report.bad[0]["reason"]


def test_equal_records_are_found_by_content(tmp_path: Path) -> None:
    write_good(tmp_path, 4)
    (tmp_path / "copy.png").write_bytes((tmp_path / "1.png").read_bytes())
    copies = [asks(text="1", image="copy.png"), asks(text="1", image="2.png"), asks(text="3", image="3.png")]
    (tmp_path / "heldout.jsonl").write_text("\n".join(map(json.dumps, copies)))
    report = look(tmp_path, f"data.eval={tmp_path / 'heldout.jsonl'}")
    first, second = tmp_path / "records.jsonl", tmp_path / "heldout.jsonl"
    assert report.duplicates == [[f"{first}:2", f"{second}:1"], [f"{first}:4", f"{second}:3"]]
    assert report.leaked == 2


def killed_after(folder: Path, parts: int) -> None:
    done = 0

    def kill(_: int) -> None:
        nonlocal done
        done += 1
        if done == parts:
            os.kill(os.getpid(), signal.SIGKILL)

    options = compose_options(words_of(folder))[0]
    prepared = prepare(options)
    examine(prepared.sets["data.train"], length_cache(options, prepared.folder, "examined"), kill)


def words_of(folder: Path) -> list[str]:
    given = [f"data.train={folder / 'records.jsonl'}", f"data.cache={folder / 'cache'}"]
    return ["data=files", "data.workers=0", "tracker=none", *given]


def test_a_killed_look_goes_on_where_it_was(tmp_path: Path) -> None:
    write_good(tmp_path, 400)
    call = f"from {__name__} import Path, killed_after; killed_after(Path({str(tmp_path)!r}), 2)"
    # A new interpreter: forked from this process, with its threads, a child sometimes hangs.
    process = subprocess.run([sys.executable, "-c", call], cwd=ROOT, timeout=120)
    assert process.returncode == -signal.SIGKILL
    assert look(tmp_path).known == 256
    (tmp_path / "7.png").write_bytes(png(40, 40))  # changed: looked at again
    assert look(tmp_path).known == 399


def test_a_second_look_starts_no_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_good(tmp_path, 200)
    look(tmp_path)
    counts: list[int] = []
    start = workers.Results._start

    def counted(self: workers.Results[Any], done: int) -> Any:
        counts.append(self.workers.count)
        return start(self, done)

    monkeypatch.setattr(workers.Results, "_start", counted)
    assert look(tmp_path, "data.workers=2").known == 200
    assert counts == []
    prepared = prepare(compose_options([*words_of(tmp_path), "data.workers=2"])[0])
    first = prepared.sets["data.train"].measure(length_cache(prepared.options, prepared.folder))  # nothing is known yet
    second = prepared.sets["data.train"].measure(length_cache(prepared.options, prepared.folder))
    assert counts == [1, 0]
    assert (first[0].lengths == second[0].lengths).all()


def test_lengths_are_those_that_training_measures(tmp_path: Path) -> None:
    write_good(tmp_path, 30)
    (tmp_path / "7.png").write_bytes(b"")
    prepared = prepare(compose_options(words_of(tmp_path))[0])
    records = prepared.sets["data.train"]
    examined, measured = examine(records, None).measured(records), records.measure()[0]
    assert (examined.lengths == measured.lengths).all()
    assert (examined.types, examined.ends.tolist()) == (measured.types, measured.ends.tolist())


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "whole"
    write_random_model(write_small_model(tmp_path), folder, seed=0)
    return folder


def test_a_model_folder_is_looked_at_without_loading_it(tmp_path: Path, model: Path) -> None:
    write_good(tmp_path, 2)
    words = (f"model.path={model}", "model.random_from=null")
    assert look(tmp_path, *words).faults == []
    file = model / "model.safetensors"
    tensors = load_file(file)
    tensors["llm.model.norm.weight"] = torch.zeros(3)
    tensors["more"] = torch.zeros(1)
    del tensors["llm.lm_head.weight"]
    save_file(tensors, file)
    report = look(tmp_path, *words)
    assert "1 weights are missing: llm.lm_head.weight" in report.faults[0]
    assert "'llm.model.norm.weight' has the shape [3], and config.json asks for [64]" in report.faults[1]
    assert any("no place for: more" in note for note in report.notes)
    file.write_bytes(file.read_bytes()[:-100])
    assert "is cut short or damaged" in look(tmp_path, *words).faults[0]


def test_the_command_ends_with_a_code_and_writes_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_good(tmp_path, 2)
    shutil.copy(ROOT / "data/tiny/config.json", tmp_path)
    (tmp_path / "a.wav").write_bytes(wav(0.5))
    with pytest.raises(SystemExit) as ended:
        main(["doctor", *words_of(tmp_path), "--json", str(tmp_path / "report.json")])
    assert ended.value.code == 0
    assert json.loads((tmp_path / "report.json").read_text())["sources"][0]["records"] == 2
    assert capsys.readouterr().out.endswith("all is well\n")
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "data=files", "run.max_stepz=3"])
    assert "did you mean run.max_steps?" in str(ended.value.code)
