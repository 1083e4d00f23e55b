"""Sources as the options name them."""

from train.config import SourceOptions
from train.sources import source_specs


def test_a_name_that_is_taken_gets_a_number() -> None:
    sources = [
        SourceOptions(path="a/train.jsonl"),
        SourceOptions(path="b/train.jsonl"),
        SourceOptions(path="c/other.jsonl", name="train-3"),
        SourceOptions(path="d/train.parquet", root="e"),
        SourceOptions(path="d/x.jsonl", name="x"),
    ]
    specs = source_specs(sources)
    assert [spec.name for spec in specs] == ["train", "train-2", "train-3", "train-4", "x"]
    assert [spec.root for spec in specs] == ["a", "b", "c", "e", "d"]
