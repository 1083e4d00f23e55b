"""`omnitune evaluate`: the table and the predictions, on one rank and on two."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.runs import SAMPLE, forget_accelerator, succeed, write_small_model
from train.commands.main import main
from train.config import METRICS
from train.export.model_folder import write_random_model

pytestmark = pytest.mark.end_to_end

RECORDS = 9


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate")
    write_random_model(write_small_model(folder), folder / "export", seed=0)
    return folder / "export"


def evaluate(model: Path, *words: str | Path) -> None:
    forget_accelerator()
    main(["evaluate", str(model), *map(str, words), "--max-new-tokens", "6", "--batch-size", "2"])


def rows(table: str) -> dict[str, dict[str, str]]:
    header, *lines = [line.split() for line in table.splitlines()]
    return {line[0]: dict(zip(header[1:], line[1:], strict=True)) for line in lines}


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_two_ranks_give_the_table_of_one(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every other record's reference is what the model says, so that the figures are known."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    first = tmp_path / "first.jsonl"
    evaluate(model, "data=sample", f"eval.max_records={RECORDS}", "--predictions", first)
    assert rows(capsys.readouterr().out)["all"]["records"] == str(RECORDS)

    raw = (SAMPLE / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    kinds: dict[str, list[bool]] = {}
    lines = []
    for number, said in enumerate(read(first)):
        record = json.loads(raw[said["line"] - 1])
        assert record["type"] == said["type"]
        is_echo = number % 2 == 0 and said["answer"] != ""
        if is_echo:
            record["conversations"][-1]["content"] = said["answer"]
        kinds.setdefault(said["type"], []).append(is_echo)
        lines.append(json.dumps(record, ensure_ascii=False))
    echoes = sum(sum(kind) for kind in kinds.values())
    assert 2 <= echoes < RECORDS
    records = tmp_path / "echo.jsonl"
    records.write_text("\n".join(lines), encoding="utf-8")

    evaluate(model, records, "--root", SAMPLE, "--predictions", tmp_path / "one.jsonl")
    table = capsys.readouterr().out
    found = rows(table)
    assert list(found["all"]) == ["records", "loss", *METRICS, "cut_answers"]
    assert list(found) == [*sorted(kinds), "all"]
    for kind, matched in kinds.items():
        assert found[kind]["records"] == str(len(matched))
        assert found[kind]["exact_match"] == f"{sum(matched) / len(matched):.4f}"
    assert found["all"]["exact_match"] == f"{echoes / RECORDS:.4f}"

    words = ["train.commands.main", "evaluate", str(model), str(records), "--root", str(SAMPLE)]
    words += ["--predictions", str(tmp_path / "two.jsonl"), "--max-new-tokens", "6", "--batch-size", "2"]
    done = succeed(words, processes=2, script="-m")
    assert done.stdout.strip() == table.strip()
    assert read(tmp_path / "two.jsonl") == read(tmp_path / "one.jsonl")
    assert [line["line"] for line in read(tmp_path / "one.jsonl")] == list(range(1, RECORDS + 1))


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (["data=smaple"], "Could not find 'data/smaple'"),
        (["absent.jsonl"], "there is no file 'absent.jsonl'"),
        (["data=sample", "eval.metrics=[bleu]"], "there is no metric 'bleu'; choose from exact_match, "),
        (["data=sample", "eval.metrics=[wer/spech]"], "no held-out record is of type 'spech'"),
    ],
)
def test_faults_end_in_a_message(model: Path, words: list[str], fault: str) -> None:
    with pytest.raises(SystemExit, match=r"^error: ") as error:
        evaluate(model, *words)
    assert fault in str(error.value)


def test_a_metric_of_one_type_alone(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate(model, "data=sample", "eval.metrics=[f1,wer/speech]", "--max-records", "6")
    found = rows(capsys.readouterr().out)
    assert list(found["all"]) == ["records", "loss", "f1", "wer", "cut_answers"]
    assert found["all"]["wer"] == found["speech"]["wer"] != "-"
    assert {row["wer"] for kind, row in found.items() if kind not in ("speech", "all")} == {"-"}
