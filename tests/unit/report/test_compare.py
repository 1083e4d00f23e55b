"""Runs beside each other."""

from pathlib import Path

import pytest

from tests.unit.report.builders import evaluation, step, write_run
from train.commands.main import main
from train.commands.options import read_options
from train.report.compare import Comparison, as_text, compare, names_of, write_comparison
from train.report.options import different, differing

RIGHT, WRONG = ("a", "a"), ("a", "b")


def write_two(folder: Path) -> list[Path]:
    """Two runs whose second answers 6 of 8 records rightly, the first 2, all of them among the 6."""
    first = [RIGHT] * 2 + [WRONG] * 6
    second = [RIGHT] * 6 + [WRONG] * 2
    words = ["eval.metrics=[exact_match]", "lora=lora"]
    return [
        write_run(folder / "one", [step(1, 2), evaluation(1, 1.5)], {1: first}, [*words, "lora.rank=8"]),
        write_run(folder / "two", [step(1, 1), evaluation(1, 0.5)], {1: second}, [*words, "lora.rank=16"]),
    ]


def compared(paths: list[Path]) -> Comparison:
    return compare(paths, [read_options(path / "config.yaml") for path in paths])


def test_a_run_that_answers_more_is_better(tmp_path: Path) -> None:
    found = compared(write_two(tmp_path))
    loss, exact_match = found.rows
    assert loss.values == [1.5, 0.5]
    assert exact_match.values == [0.25, 0.75]
    assert exact_match.records == 8
    interval = exact_match.intervals[1]
    assert interval
    # The gain of a resample is the share of 8 draws that met the 4 records of 8 that were gained: binomial(8, 1/2) / 8,
    # whose 2.5 % and 97.5 % points are 1 / 8 and 7 / 8.
    assert (interval.difference, interval.low, interval.high) == (0.5, 0.125, 0.875)
    assert exact_match.verdict(1) == "better"
    assert "two  0.5   0.75 (+0.500: +0.125 to +0.875) better" in as_text(found)


def test_the_records_on_which_they_disagree(tmp_path: Path) -> None:
    found = compared(write_two(tmp_path))
    assert [one.of.line for one in found.disagreements] == [3, 4, 5, 6]
    assert found.disagreements[0].answers == ["b", "a"]


def test_only_records_that_all_have_answered_count(tmp_path: Path) -> None:
    one, two = write_two(tmp_path)
    file = two / "predictions" / "step-000001.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([lines[0].replace('"reference": "a"', '"reference": "c"'), *lines[1:5]]))
    found = compared([one, two])
    assert found.records == 4
    assert found.rows[1].values == [0.25, 1.0]


def test_runs_without_answers_are_compared_by_their_curves(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one", [step(1, 2)])
    two = write_run(tmp_path / "two", [step(1, 1)])
    found = compared([one, two])
    assert found.records == 0
    assert [row.values for row in found.rows] == [[None, None]]
    write_comparison(tmp_path / "page.html", found)


def test_names_are_as_short_as_they_can_be() -> None:
    assert names_of([Path("/a/x"), Path("/b/y")]) == ["x", "y"]
    assert names_of([Path("/a/x"), Path("/b/x")]) == ["a/x", "b/x"]
    assert names_of([Path("/a/x"), Path("/a/x")]) == ["x (1)", "x (2)"]


def test_options_that_differ(tmp_path: Path) -> None:
    options = [read_options(path / "config.yaml") for path in write_two(tmp_path)]
    assert differing(options) == [("lora.rank", ["8", "16"])]
    changed = {name: (value, default) for name, value, default in different(options[0])}
    assert changed["lora.rank"] == ("8", "16")
    assert changed["data.train"] == ("[{path: data/sample/train.jsonl}]", "[]")
    assert "optim.betas" not in changed


def test_the_command_prints_a_table_and_writes_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "page.html"
    main(["compare", *map(str, write_two(tmp_path)), "--out", str(out)])
    said = capsys.readouterr().out
    assert "paired bootstrap interval (95 %) over 8 held-out records" in said
    assert out.as_uri() in said
    assert "lora.rank" in out.read_text()
    with pytest.raises(SystemExit, match="name two runs or more"):
        main(["compare", str(tmp_path / "one")])
