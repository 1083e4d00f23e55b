import json
import os
import pickle
from pathlib import Path

import pytest

from tests.unit.data.builders import PeakMemory
from train.data import readers
from train.data.readers import JsonLines, JsonList, Parquet, open_source
from train.errors import BadRecord, OmniTuneError


def write(folder: Path, content: bytes, name: str = "records.jsonl") -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def test_json_lines_by_index_and_line(tmp_path):
    content = b'\xef\xbb\xbf{"n": 1}\r\n\n   \t\n{"n": "\xc3\xa9"}\n' + b" " * 40 + b'{"n": 3}'
    source = open_source(write(tmp_path, content))
    assert isinstance(source, JsonLines)
    assert [source[i] for i in range(len(source))] == [{"n": 1}, {"n": "é"}, {"n": 3}]
    assert [source.line(i) for i in range(3)] == [1, 4, 5]


def test_lines_longer_than_the_reading_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "_CHUNK", 7)
    records = [{"n": i, "text": "x" * i} for i in range(30)]
    source = open_source(write(tmp_path, "".join(json.dumps(r) + "\n" for r in records).encode()))
    assert [source[i] for i in reversed(range(30))] == records[::-1]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"n": }', "invalid JSON"),
        (b'{"n": NaN}', "NaN is not a JSON number"),
        (b'{"n": -Infinity}', "-Infinity is not a JSON number"),
        (b'{"n": "\xff"}', "not UTF-8"),
        (b"[1, 2]", "a JSON object was expected, found list"),
        (b'{"n": "' + b"x" * 100 + b'"}', "keep media in files"),
        (b'{"n": ' + b"[" * 99_000 + b"}", "invalid JSON"),
    ],
)
def test_a_bad_line_costs_only_itself(tmp_path, monkeypatch, line, reason):
    monkeypatch.setattr(readers, "MAX_LINE_BYTES", 100 if b"xx" in line else 2**20)
    source = open_source(write(tmp_path, b'{"n": 1}\n\n' + line + b'\n{"n": 3}\n'))
    assert (source[0], source[2]) == ({"n": 1}, {"n": 3})
    with pytest.raises(BadRecord, match=r"records\.jsonl:3: .*" + reason):
        source[1]


def test_json_list_whatever_its_name(tmp_path):
    source = open_source(write(tmp_path, b'\xef\xbb\xbf \n[{"n": 1},\n 7, {"n": 3}]', "data.txt"))
    assert isinstance(source, JsonList)
    assert (len(source), source[2], source.line(2)) == (3, {"n": 3}, 3)
    with pytest.raises(BadRecord, match=r"data\.txt:2: a JSON object was expected, found int"):
        source[1]


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64])
def test_a_list_in_chunks(tmp_path, monkeypatch, chunk):
    texts = ['"', "\\", '\\"', '\\\\"', "[", "]", "{", "}", ",", '],["', "\n", "é,", "\\\\\\", ""]
    records = [{"n": i, text: [text, {"a": [text, [], {}]}]} for i, text in enumerate(texts)]
    monkeypatch.setattr(readers, "_CHUNK", chunk)
    for space, ascii in ((None, True), (2, False)):
        path = write(tmp_path, json.dumps(records, indent=space, ensure_ascii=ascii).encode())
        source = JsonList(path)
        assert [source[i] for i in range(len(source))] == records


def test_a_broken_item_of_a_list_costs_only_itself(tmp_path):
    source = open_source(write(tmp_path, b'[{"n": 1}, {"n": }, {"n": 3} {"n": 4}, nothing, {"n": 5}]'))
    assert (len(source), source[0], source[4]) == (5, {"n": 1}, {"n": 5})
    for index in (1, 2, 3):
        with pytest.raises(BadRecord, match=rf"records\.jsonl:{index + 1}: invalid JSON"):
            source[index]


@pytest.mark.parametrize(("content", "item"), [(b"[,1]", 1), (b"[1,,2]", 2), (b"[1, ]", 2)])
def test_a_list_with_a_gap(tmp_path, content, item):
    with pytest.raises(OmniTuneError, match=rf"not a valid JSON list \(item {item}: nothing stands there\)"):
        open_source(write(tmp_path, content))


def test_a_list_item_over_64_mib_is_never_parsed(tmp_path):
    """As objects of Python it would take 2 GB."""
    path = write(tmp_path, b'[{"n": 1}, [' + b"[]," * (24 * 2**20) + b'[]], {"n": 3}]')
    with PeakMemory() as peak:
        source = open_source(path)
        assert (source[0], source[2]) == ({"n": 1}, {"n": 3})
        with pytest.raises(BadRecord, match=r"records\.jsonl:2: the record has 75497477 bytes, more than 64 MiB"):
            source[1]
    assert peak.mib < 300


@pytest.mark.parametrize("unit", [b"[]", b"{}", b'{"a":1}', b"0.5"])
def test_a_record_of_too_many_values_is_not_parsed(tmp_path, unit):
    path = write(tmp_path, b'{"n": [' + (unit + b",") * (2**21) + unit + b"]}")
    source = open_source(path)
    with PeakMemory() as peak, pytest.raises(BadRecord, match=r"records\.jsonl:1: the record has over 2097152 values"):
        source[0]
    assert peak.mib < 150


@pytest.mark.parametrize("unit", [b"[]", b'{"a":1}', b'"\xf0\x9f\x90\x8b"'])
def test_the_most_values_take_less_than_a_gib(tmp_path, unit):
    source = open_source(write(tmp_path, b'{"n": [' + (unit + b",") * (2**20 - 10) + unit + b"]}"))
    with PeakMemory() as peak:
        assert len(source[0]["n"]) == 2**20 - 9
    assert peak.mib < 1024


def test_parquet_hands_over_plain_values(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"image": {"bytes": b"\x89PNG", "path": "a.png"}, "conversations": [{"from": "gpt", "value": "é"}]}] * 3
    table = datasets.Dataset.from_list(rows)
    # The column is declared as images, which must not be decoded here.
    table.cast_column("image", datasets.Image(decode=False)).to_parquet(tmp_path / "rows.bin")
    source = open_source(tmp_path / "rows.bin")
    assert isinstance(source, Parquet)
    assert (len(source), source[1], source.line(1)) == (3, rows[1], 2)
    assert pickle.loads(pickle.dumps(source))[2] == rows[2]


def test_a_format_that_is_given(tmp_path):
    path = write(tmp_path, b'[1]\n{"n": 2}\n')
    assert open_source(path, "jsonl")[1] == {"n": 2}
    with pytest.raises(OmniTuneError, match="not a valid JSON list"):
        open_source(path)
    with pytest.raises(OmniTuneError, match=r"not a valid JSON list \(it begins with '\{'"):
        open_source(write(tmp_path, b'{"n": 1}'), "json")


def test_a_pickled_source_opens_its_file_again(tmp_path):
    source = open_source(write(tmp_path, b'{"n": 1}\n{"n": 2}\n'))
    source[0]
    assert pickle.loads(pickle.dumps(source))[1] == {"n": 2}


def test_a_forked_worker_does_not_move_the_position(tmp_path):
    source = open_source(write(tmp_path, b"".join(b'{"n": %d}\n' % i for i in range(200))))
    source[0]
    child = os.fork()
    if not child:
        os._exit(0 if all(source[i] == {"n": i} for i in range(200)) else 1)
    assert [source[i]["n"] for i in range(200)] == list(range(200))
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "does not exist"),
        (b"", "holds no records"),
        (b" \n\n", "holds no records"),
        (b"[]", "holds no records"),
        (b'[{"n": 1}', "not a valid JSON list"),
        (b"PAR1 is not enough", "cannot be read as parquet"),
    ],
)
def test_a_file_that_cannot_be_used(tmp_path, content, reason):
    path = tmp_path / "records.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(OmniTuneError, match=reason) as fault:
        open_source(path)
    assert str(path) in str(fault.value)


def test_a_folder_is_not_a_file(tmp_path):
    with pytest.raises(OmniTuneError, match="is a folder"):
        open_source(tmp_path)
