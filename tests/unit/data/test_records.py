import base64
import os
from pathlib import Path

import pytest

from train.data.records import parse_record
from train.errors import BadRecord
from train.schema import Part, Span


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """photos/ with a.jpg, b.jpg, sub/c.jpg, q.wav, and links; secret.jpg lies outside."""
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    for name in ("a.jpg", "b.jpg", "sub/c.jpg", "q.wav", "../secret.jpg"):
        (folder / name).write_bytes(b"x")
    (folder / "good_link.jpg").symlink_to(folder / "a.jpg")
    (folder / "bad_link.jpg").symlink_to(tmp_path / "secret.jpg")
    (folder / "way_out").symlink_to(tmp_path)
    os.mkfifo(folder / "pipe.jpg")
    return folder


def parse(raw, root):
    return parse_record(raw, root=root, file="records.jsonl", line=17)


def parts(record, turn=0):
    """(kind, text or file name or bytes) of a turn."""
    return [
        (p.kind, p.content if p.kind == "text" or isinstance(p.content, bytes) else Path(p.content).name)
        for p in record.turns[turn].parts
    ]


def megrez(content, **extra):
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": {"text": "yes"}}]
    return {"conversations": turns, **extra}


def llava(*values, **extra):
    speakers = ["human", "gpt"] * len(values)
    return {
        "conversations": [{"from": s, "value": v} for s, v in zip(speakers, values, strict=False)],
        **extra,
    }


def openai(content, **answer):
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "yes", **answer}]}


def test_megrez_format_orders_images_audio_text(root):
    record = parse(megrez({"text": "hi", "audio": "q.wav", "image": ["a.jpg", "sub/c.jpg"]}, type="speech"), root)
    assert parts(record) == [("image", "a.jpg"), ("image", "c.jpg"), ("audio", "q.wav"), ("text", "hi")]
    assert parts(record, 1) == [("text", "yes")]
    assert [turn.role for turn in record.turns] == ["user", "assistant"]
    assert (record.file, record.line, record.type) == ("records.jsonl", 17, "speech")


def test_megrez_format_with_strings_and_nulls(root):
    assert parts(parse(megrez("a plain <image> text"), root)) == [("text", "a plain <image> text")]
    assert parts(parse(megrez({"text": "hi", "image": None, "audio": []}), root)) == [("text", "hi")]
    assert parse(megrez("hi", type=7), root).type == ""


def test_llava_tags_stand_where_they_stand(root):
    record = parse(
        llava(
            "<image>\nFirst?<audio>\n\nand <image> this",
            "An <image> tag",
            image=["a.jpg", "b.jpg"],
            audio="q.wav",
        ),
        root,
    )
    assert parts(record) == [
        ("image", "a.jpg"),
        ("text", "First?"),
        ("audio", "q.wav"),
        ("text", "\nand "),
        ("image", "b.jpg"),
        ("text", " this"),
    ]
    assert parts(record, 1) == [("text", "An <image> tag")]


def test_llava_tags_across_turns(root):
    record = parse(llava("<image>\nOne", "1", "<image>\nTwo", "2", images=["a.jpg", "b.jpg"]), root)
    assert parts(record, 0) == [("image", "a.jpg"), ("text", "One")]
    assert parts(record, 2) == [("image", "b.jpg"), ("text", "Two")]


def test_llava_media_without_tags_go_first(root):
    raw = llava("What?", "That.", "And?", "This.", image="a.jpg", audio="q.wav")
    raw["conversations"].insert(0, {"from": "system", "value": "Be brief."})
    record = parse(raw, root)
    assert parts(record, 0) == [("text", "Be brief.")]
    assert parts(record, 1) == [("image", "a.jpg"), ("audio", "q.wav"), ("text", "What?")]
    assert parts(record, 3) == [("text", "And?")]


def test_openai_format(root):
    data = base64.b64encode(b"png").decode()
    content = [
        {"type": "text", "text": "Look: "},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}},
        {"type": "image_url", "image_url": "a.jpg"},
        {"type": "input_audio", "input_audio": {"data": base64.b64encode(b"wav").decode(), "format": "wav"}},
        {"type": "input_audio", "input_audio": {"data": f"data:audio/wav;base64,{data}"}},
        {"type": "image", "image": "b.jpg"},
        {"type": "image", "path": "sub/c.jpg"},
        {"type": "audio", "audio": {"bytes": None, "path": "q.wav"}, "text": None},
    ]
    assert parts(parse(openai(content), root)) == [
        ("text", "Look: "),
        ("image", b"png"),
        ("image", "a.jpg"),
        ("audio", b"wav"),
        ("audio", b"png"),
        ("image", "b.jpg"),
        ("image", "c.jpg"),
        ("audio", "q.wav"),
    ]
    assert parts(parse(openai("plain"), root)) == [("text", "plain")]


def test_parquet_rows_carry_bytes(root):
    raw = llava("<image>Q", "A", image={"bytes": b"jpeg", "path": "gone.jpg"}) | {
        "messages": None,
        "audio": None,
    }
    assert parts(parse(raw, root)) == [("image", b"jpeg"), ("text", "Q")]


def test_observation_and_weights(root):
    raw = {
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "u", "weight": None},
            {"role": "assistant", "content": "call", "weight": 0},
            {"role": "observation", "content": "o"},
            {"role": "assistant", "content": "a", "weight": 2},
        ]
    }
    record = parse(raw, root)
    assert [(turn.role, turn.weight) for turn in record.turns] == [
        ("system", 1.0),
        ("user", 1.0),
        ("assistant", 0.0),
        ("observation", 1.0),
        ("assistant", 2.0),
    ]


def test_paths_are_resolved_under_root(root, monkeypatch):
    inside = [
        {"type": "image", "image": str(root / "a.jpg")},
        {"type": "image", "image": "sub/../good_link.jpg"},
    ]
    real = str((root / "a.jpg").resolve())
    assert parse(openai(inside), root).turns[0].parts == (Part("image", real), Part("image", real))
    monkeypatch.chdir(root.parent)
    relative = parse(megrez({"image": "a.jpg"}), Path("photos"))
    assert relative.turns[0].parts == (Part("image", real),)


def turns(*pairs):
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        ({"text": "hi"}, "no turns found"),
        ({"messages": []}, "no turns found"),
        ({"messages": ["hi"]}, "turn 1 is str"),
        (
            turns(("tool", "x"), ("assistant", "y")),
            "turn 1 has the unknown role 'tool'; use one of system, user",
        ),
        ({"conversations": [{"from": "bot", "value": "x"}]}, "unknown role 'bot'; use one of human, gpt"),
        (turns(("user", ""), ("assistant", "y")), r"turn 1 \(user\) is empty"),
        (turns(("user", "x"), ("assistant", " \n")), r"turn 2 \(assistant\) is empty"),
        (
            turns(("user", "x"), ("system", "s"), ("assistant", "y")),
            "turn 2 is a system turn; only the first",
        ),
        (turns(("user", "x")), "there is no assistant turn"),
        (openai("x", weight=0), "every assistant turn has weight 0"),
        (openai("x", weight=-1), "turn 2 has the weight -1"),
        (openai("x", weight=True), "turn 2 has the weight True"),
        (openai("x", weight=float("inf")), "turn 2 has the weight inf"),
        (turns(("user", 7), ("assistant", "y")), "the content of a turn is int"),
        (turns(("user", {"text": 7}), ("assistant", "y")), "a text is int"),
        (turns(("user", "\ud800"), ("assistant", "y")), "surrogate"),
        (turns(("user", {"text": "x", "video": "a.mp4"}), ("assistant", "y")), "unknown key 'video'"),
        (openai([{"type": "video"}]), "a content item has the type 'video'"),
        (openai(["x"]), "a content item has the type None"),
        (
            turns(("user", "x"), ("assistant", {"image": "a.jpg"})),
            "turn 2 is the assistant's and holds an image",
        ),
        (
            megrez({"image": "missing.jpg"}),
            r"image 'missing.jpg' not found under .*photos/; fix the path or set root",
        ),
        (megrez({"image": "a.jpg/x"}), "image 'a.jpg/x' not found"),
        (megrez({"image": "../secret.jpg"}), "image '../secret.jpg' lies outside"),
        (megrez({"image": "bad_link.jpg"}), "image 'bad_link.jpg' lies outside"),
        (megrez({"image": "way_out/secret.jpg"}), "image 'way_out/secret.jpg' lies outside"),
        (megrez({"image": "/etc/hostname"}), "image '/etc/hostname' lies outside"),
        (megrez({"image": ".."}), "image '..' lies outside"),
        (megrez({"audio": "sub"}), "audio 'sub' is not a regular file"),
        (megrez({"image": "pipe.jpg"}), "image 'pipe.jpg' is not a regular file"),
        (megrez({"image": "a\0b.jpg"}), "cannot be looked up"),
        (megrez({"image": "x" * 300}), "cannot be looked up"),
        (megrez({"image": 7}), "image 7 is neither a path nor encoded bytes"),
        (megrez({"image": ""}), "image '' is neither"),
        (megrez({"image": {"bytes": b""}}), "neither a path nor"),
        (openai([{"type": "image"}]), "image None is neither"),
        (
            openai([{"type": "image_url", "image_url": {"url": "https://x.org/a.png"}}]),
            "is a URL, and nothing is",
        ),
        (openai([{"type": "image_url", "image_url": "data:image/png,abc"}]), "data URL without base64"),
        (
            openai([{"type": "input_audio", "input_audio": {"data": "?"}}]),
            "embedded audio is not valid base64",
        ),
        (openai([{"type": "image", "image": "data:image/png;base64,"}]), "embedded image is empty"),
        (llava("<image><image>", "A", image="a.jpg"), r"2 <image> tag\(s\) for 1 image\(s\)"),
        (llava("<image>", "A"), r"1 <image> tag\(s\) for 0 image\(s\)"),
        ({"conversations": [{"from": "gpt", "value": "x"}], "image": "a.jpg"}, "no user turn to put them in"),
    ],
)
def test_bad_records_say_where_and_why(root, raw, reason):
    with pytest.raises(BadRecord, match=reason) as fault:
        parse(raw, root)
    assert str(fault.value).startswith("records.jsonl:17: ")


@pytest.mark.parametrize(
    "raw",
    [
        megrez({"audio": {"path": "q.wav", "start_s": 12.5, "end_s": 31}}),
        megrez({"audio": [{"path": "q.wav", "bytes": None, "start_s": 12.5, "end_s": 31}]}),
        llava("<audio>", "yes", audio={"path": "q.wav", "start_s": 12.5, "end_s": 31}),
        openai([{"type": "audio", "path": "q.wav", "start_s": 12.5, "end_s": 31}]),
        openai([{"type": "audio", "audio": {"path": "q.wav", "start_s": 12.5, "end_s": 31}}]),
        openai([{"type": "audio_url", "audio_url": {"url": "q.wav", "start_s": 12.5, "end_s": 31}}]),
    ],
)
def test_a_recording_may_name_a_span(root, raw):
    [part] = parse(raw, root).turns[0].parts
    assert part == Part("audio", Span(str((root / "q.wav").resolve()), 12.5, 31.0))


def test_a_span_without_an_end_or_a_start(root):
    whole = str((root / "q.wav").resolve())
    for span, expected in (({"start_s": 2}, Span(whole, 2.0)), ({"end_s": 3.5}, Span(whole, 0.0, 3.5))):
        assert parse(megrez({"audio": {"path": "q.wav", **span}}), root).turns[0].parts[0].content == expected
    none = {"path": "q.wav", "start_s": None, "end_s": None}
    assert parse(megrez({"audio": none}), root).turns[0].parts[0].content == whole


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ({"audio": {"path": "q.wav", "start_s": "2"}}, "audio with start_s '2'; write seconds, from 0 to 1e"),
        ({"audio": {"path": "q.wav", "end_s": -1}}, "audio with end_s -1; write seconds"),
        ({"audio": {"path": "q.wav", "end_s": float("nan")}}, "audio with end_s nan; write seconds"),
        (
            {"audio": {"path": "q.wav", "start_s": 3, "end_s": 3}},
            "audio with end_s 3 and start_s 3; end_s is",
        ),
        ({"image": {"path": "a.jpg", "start_s": 3}}, "image with start_s; a span is one recording's"),
    ],
)
def test_a_span_that_is_none(root, content, why):
    with pytest.raises(BadRecord, match=f"records.jsonl:17: {why}"):
        parse(megrez(content), root)
