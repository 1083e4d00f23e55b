"""The shipped sample and the tiny model's folder are what data/README.md says."""

import hashlib
import importlib.util
import json
import re
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
import soundfile
from PIL import Image
from transformers import AutoTokenizer

from train.data.records import parse_record
from train.families.megrezo.geometry import image_layout

DATA = Path(__file__).parents[2] / "data"
SAMPLE, TINY = DATA / "sample", DATA / "tiny"

COUNTS = {
    "train": {
        "speech": 600,
        "typed_picture": 750,
        "spoken_picture": 750,
        "turns": 600,
        "pictures": 150,
        "text": 150,
    },
    "heldout": {
        "speech": 60,
        "typed_picture": 75,
        "spoken_picture": 75,
        "turns": 60,
        "pictures": 15,
        "text": 15,
    },
}
QUESTIONS = ("What color is the object?", "What color is the background?", "Is the object small or large?")
COLORS = {"red", "green", "blue", "yellow", "purple", "orange"}
BACKGROUNDS = {"black", "white", "gray", "brown"}


def load_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, DATA / f"{name}.py")
    assert spec
    assert spec.loader
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read(split: str) -> list[dict]:
    return [json.loads(line) for line in (SAMPLE / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


def contents(record: dict) -> list[dict]:
    return [turn["content"] for turn in record["conversations"]]


def media(records: list[dict]) -> list[str]:
    """Paths of all media of the records, as often as they are named."""
    found = []
    for record in records:
        for content in contents(record):
            for kind in ("image", "audio"):
                value = content.get(kind, [])
                found += value if isinstance(value, list) else [value]
    return found


@pytest.fixture(scope="module")
def splits() -> dict[str, list[dict]]:
    return {split: read(split) for split in COUNTS}


@pytest.fixture(scope="module")
def make_sample() -> ModuleType:
    return load_script("make_sample")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY)


def test_counts(splits):
    assert {split: Counter(record["type"] for record in splits[split]) for split in splits} == COUNTS


def test_types_hold_what_they_promise(splits):
    def shape(record):
        return [sorted(content) for content in contents(record)]

    for record in splits["train"] + splits["heldout"]:
        first, *_, answer = contents(record)
        assert " " not in answer["text"]
        match record["type"]:
            case "speech":
                assert shape(record) == [["audio", "text"], ["text"]]
                assert first["text"] == "Convert speech to text."
            case "typed_picture":
                assert shape(record) == [["image", "text"], ["text"]]
                assert first["text"] in QUESTIONS
            case "spoken_picture":
                assert shape(record) == [["audio", "image"], ["text"]]
            case "turns":
                assert shape(record)[:2] == [["image", "text"], ["text"]]
                assert shape(record)[2] in (["audio"], ["text"])
                assert len(record["conversations"]) == 6
            case "pictures":
                assert shape(record) == [["image", "text"], ["text"]]
                assert len(first["image"]) == 2
            case "text":
                assert shape(record) == [["text"], ["text"]]


def test_every_record_is_usable(splits):
    for split, records in splits.items():
        for line, raw in enumerate(records, 1):
            parse_record(raw, root=SAMPLE, file=f"{split}.jsonl", line=line)


def test_media_are_referenced_once_and_all_are_there(splits):
    named = media(splits["train"]) + media(splits["heldout"])
    there = [path.relative_to(SAMPLE).as_posix() for path in SAMPLE.rglob("*.*") if path.suffix != ".jsonl"]
    assert Counter(named) == Counter(there)


def test_size():
    assert sum(path.stat().st_size for path in SAMPLE.rglob("*") if path.is_file()) < 8_000_000


def test_no_medium_occurs_twice(make_sample):
    paths = [path for path in SAMPLE.rglob("*.*") if path.suffix != ".jsonl"]
    make_sample.check_all_different(paths)


def test_equal_media_are_refused(make_sample, tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    Image.new("L", (4, 4)).save(tmp_path / "b.png")
    with pytest.raises(AssertionError, match="equal"):
        make_sample.check_all_different([tmp_path / "a.png", tmp_path / "b.png"])


def test_no_text_record_is_in_both_splits(splits):
    train, heldout = (
        {contents(record)[0]["text"] for record in splits[split] if record["type"] == "text"}
        for split in ("train", "heldout")
    )
    assert len(train) == 150
    assert len(heldout) == 15
    assert not train & heldout


def test_heldout_texts_are_taught(splits, make_sample):
    """Training has the fact in another wording, and the wording of another fact."""

    def parse(record):
        question, answer = (content["text"] for content in contents(record))
        for kind, phrasings in make_sample.PHRASINGS.items():
            for number, phrasing in enumerate(phrasings):
                if found := re.fullmatch(re.escape(phrasing).replace(r"\{\}", r"(\w+)"), question):
                    return (kind, found[1], answer), (kind, number)
        raise AssertionError(question)

    train, heldout = (
        [parse(record) for record in splits[split] if record["type"] == "text"] for split in ("train", "heldout")
    )
    facts, wordings = map(set, zip(*train, strict=True))
    assert all(fact in facts and wording in wordings for fact, wording in heldout)
    assert ("opposite", "hot", "cold") in facts
    assert ("after", "nine", "ten") in facts


@pytest.mark.parametrize("split", COUNTS)
def test_answers_are_balanced(splits, split):
    answers: dict[str, Counter] = {}
    for record in splits[split]:
        if record["type"] in ("speech", "typed_picture", "pictures"):
            question, answer = (content["text"] for content in contents(record))
            answers.setdefault(question, Counter())[answer] += 1
    assert len(answers.pop("Convert speech to text.")) == 24
    assert set(answers["Is the object small or large?"]) == {"small", "large"}
    assert set(answers["What color is the object?"]) == COLORS
    assert set(answers["What color is the background?"]) == BACKGROUNDS
    assert len(answers) == 5
    for counts in answers.values():
        assert max(counts.values()) - min(counts.values()) <= 1


@pytest.mark.parametrize("split", COUNTS)
def test_spoken_questions_have_balanced_answers(splits, split):
    answers = Counter(contents(record)[1]["text"] for record in splits[split] if record["type"] == "spoken_picture")
    assert set(answers) == COLORS | BACKGROUNDS | {"small", "large"}
    for group in (COLORS, BACKGROUNDS, {"small", "large"}):
        counts = [answers[answer] for answer in group]
        assert max(counts) - min(counts) <= 1


def test_files_are_as_described():
    for path in sorted(SAMPLE.rglob("*.png"))[::100]:
        with Image.open(path) as picture:
            assert (picture.format, picture.mode, picture.size) == ("PNG", "P", (112, 112))
    for path in sorted(SAMPLE.rglob("*.opus"))[::20]:
        info = soundfile.info(path)
        assert (info.format, info.subtype, info.samplerate, info.channels) == ("OGG", "OPUS", 16_000, 1)
        assert 0.35 < info.duration < 2.0
        assert abs(soundfile.read(path)[0]).max() > 0.1


def test_records_and_pictures_are_what_the_maker_makes(splits, make_sample, tmp_path):
    for split in make_sample.plan():
        assert split.records == splits[split.name]
        for path, picture in list(split.pictures.items())[::100]:
            picture.save(tmp_path / "again.png")
            with Image.open(tmp_path / "again.png") as again, Image.open(SAMPLE / path) as shipped:
                assert again.convert("RGB").tobytes() == shipped.convert("RGB").tobytes()


def test_recordings_say_what_their_records_answer(make_sample):
    """A word's clip is spoken as its answer; no way of speaking is used twice."""
    clips = []
    for split in make_sample.plan():
        clips += split.clips.values()
        for record in split.records:
            if record["type"] == "speech":
                asked, answer = contents(record)
                assert split.clips[asked["audio"]].text == answer["text"]
    assert len(set(clips)) == len(clips)


def test_readme_examples_are_records(tmp_path):
    for path in ("photos/a.jpg", "clips/b.wav"):
        (tmp_path / path).parent.mkdir()
        (tmp_path / path).write_bytes(b"any")
    examples = re.findall(r"```json\n(.*?)```", (DATA / "README.md").read_text(encoding="utf-8"), re.S)
    kinds = [
        [
            part.kind
            for turn in parse_record(json.loads(text), root=tmp_path, file="README", line=1).turns
            for part in turn.parts
        ]
        for text in examples
    ]
    assert kinds == [
        ["image", "text", "text", "audio", "text"],
        ["image", "text", "text"],
        ["text", "image", "audio", "text", "text"],
        ["text"] * 5,
    ]


@pytest.mark.parametrize(
    "text",
    [
        "What color is the object?",
        "  two  spaces\tand\r\nlines\n",
        "don't , keep ' spaces .",
        "你是Megrez-3B-Instruct，将针对用户的问题给出详细的、积极的回答。",
        "将语音转化为文字。今天天气很好！",
        "🦙👩‍🚀 naïve Ωμέγα e\u0301",
        '{"name": "web_search", "arguments": {"query": "x"}}',
        "",
    ],
)
def test_any_text_survives_the_tokenizer(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_every_byte_has_a_token(tokenizer):
    text = "".join(map(chr, range(0x300))) + "\u4e00\ud7ff\U0001f600\U0010ffff"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.unk_token_id not in tokenizer(text)["input_ids"]


def test_words_of_the_sample_are_single_tokens(tokenizer, splits):
    texts = [content.get("text", "") for split in splits.values() for record in split for content in contents(record)]
    words = {word for text in texts for word in re.findall(r"\w+", text)} | {"system", "user", "assistant"}
    assert {"What", "color", "banana", "small", "Convert"} <= words
    for word in words:
        assert tokenizer.tokenize(word) == [word]
        assert tokenizer.tokenize(" " + word) == ["Ġ" + word]


def test_special_tokens_follow_the_vocabulary(tokenizer, monkeypatch):
    monkeypatch.syspath_prepend(DATA)
    special = importlib.import_module("tiny_models.megrez").SPECIAL_TOKENS
    assert len(special) == 18
    ids = tokenizer.convert_tokens_to_ids(list(special))
    assert ids == list(range(len(tokenizer) - 18, len(tokenizer)))
    for token, number in zip(special, ids, strict=True):
        assert tokenizer(f"a{token}b")["input_ids"][1:-1] == [number]
    assert tokenizer.decode(ids, skip_special_tokens=True) == ""
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token, tokenizer.bos_token) == (
        "<|turn_end|>",
        "<|pad|>",
        "<|unk|>",
        None,
    )


def test_configuration_fits_the_tokenizer(tokenizer):
    config = json.loads((TINY / "config.json").read_text())
    generation = json.loads((TINY / "generation_config.json").read_text())
    assert config["vocab_size"] == 768 >= len(tokenizer) == 743
    assert config["eos_token_id"] == tokenizer.eos_token_id
    assert config["pad_token_id"] == tokenizer.pad_token_id
    assert generation["eos_token_id"] == tokenizer.convert_tokens_to_ids(["<|turn_end|>", "<|eos|>"])


def test_an_image_of_the_sample_is_one_slice_of_64_patches():
    settings = json.loads((TINY / "preprocessor_config.json").read_text())
    layout = image_layout(
        112,
        112,
        scale=settings["scale_resolution"],
        patch=settings["patch_size"],
        max_slices=settings["max_slice_nums"],
    )
    assert (layout.slices, layout.patches(settings["patch_size"])) == (1, 64)


def same_files(made: Path, shipped: Path) -> int:
    """Insist that every file under `made` is the shipped one; returns how many there are."""
    files = [file for file in made.rglob("*") if file.is_file()]
    for file in files:
        assert file.read_text(encoding="utf-8") == (shipped / file.relative_to(made)).read_text(encoding="utf-8"), file
    return len(files)


def test_the_tiny_folders_are_what_the_maker_makes(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["make_tiny.py", "--data", str(DATA), "--out", str(tmp_path)])
    load_script("make_tiny").main()
    assert same_files(tmp_path, DATA) == 6 + 5 + 5 + 6 + 6


def test_the_samples_of_text_are_what_the_maker_makes(tmp_path, monkeypatch):
    words = ["make_text.py", "--text", str(tmp_path / "text"), "--websearch", str(tmp_path / "websearch")]
    monkeypatch.setattr(sys, "argv", words)
    load_script("make_text").main()
    assert same_files(tmp_path, DATA) == 2 + 2 + 20


def test_ogg_pages_are_made_equal(make_sample, tmp_path):
    """Two encodings of one clip differ only in the stream number that libsndfile draws."""
    wave = soundfile.read(SAMPLE / "audio/train/0001.opus")[0]
    files = []
    for name in ("a.opus", "b.opus"):
        soundfile.write(tmp_path / name, wave, 16_000, format="OGG", subtype="OPUS")
        files.append((tmp_path / name).read_bytes())
    assert files[0] != files[1]
    assert len({hashlib.sha256(make_sample.normal_ogg(file)).digest() for file in files}) == 1
    (tmp_path / "c.opus").write_bytes(make_sample.normal_ogg(files[0]))
    decoded = soundfile.read(tmp_path / "c.opus")[0]
    assert (decoded == soundfile.read(tmp_path / "a.opus")[0]).all()
