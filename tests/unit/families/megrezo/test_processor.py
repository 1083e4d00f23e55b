import json
import pickle
import random
from dataclasses import asdict

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, WhisperFeatureExtractor

from tests.builders import media_of
from tests.unit.data.builders import make_tokenizer, png, talk, wav
from train.errors import BadRecord, CheckpointError
from train.families.megrezo.geometry import audio_places
from train.families.megrezo.processor import MegrezOImageProcessor, MegrezOProcessor
from train.schema import IGNORE_INDEX, Record


def words(processor, sample) -> list[str]:
    """The tokens' spellings, a byte each (few merges)."""
    return processor.tokenizer.convert_ids_to_tokens(sample.input_ids)


def learned(processor, sample) -> list[str]:
    return [word for word, label in zip(words(processor, sample), sample.labels, strict=True) if label >= 0]


def test_text_with_hand_written_labels(processor):
    sample = processor.encode(talk(("user", "hello"), ("assistant", "ll"), ("user", "a"), ("assistant", "b", 0.5)))
    user = ["<|role_start|>", "u", "s", "e", "r", "<|role_end|>"]
    assistant = ["<|role_start|>", *"assistant", "<|role_end|>"]
    end = ["<|turn_end|>"]
    expected = [*user, "hello", *end, *assistant, "ll", *end, *user, "a", *end, *assistant, "b", *end]
    assert words(processor, sample) == expected
    ll, b, turn_end = processor.tokenizer.convert_tokens_to_ids(["ll", "b", "<|turn_end|>"])
    x = IGNORE_INDEX
    assert sample.labels.tolist() == [x] * 19 + [ll, turn_end] + [x] * 19 + [b, turn_end]
    assert sample.loss_weights.tolist() == [0] * 19 + [1, 1] + [0] * 19 + [0.5, 0.5]
    assert not sample.media


def test_a_turn_of_weight_zero_is_not_learned(processor):
    sample = processor.encode(talk(("user", "q"), ("assistant", "no", 0.0), ("user", "r"), ("assistant", "yes")))
    assert learned(processor, sample) == ["y", "e", "s", "<|turn_end|>"]


def test_media_expand_to_places(processor):
    """Q = 2; 500 x 900 is cut into two rows of one cell, 100 x 100 stays whole."""
    record = talk(
        (
            "user",
            [("image", png(500, 900)), ("image", png(100, 100)), ("audio", wav(0.1)), ("text", "\n\n?")],
        ),
        ("assistant", "b"),
    )
    sample = processor.encode(record)
    unk = ["<|unk|>"]
    # 1600 samples: 10 mel frames, 5 encoder frames, 2 pooled, 4 places with begin and end. The line end after
    # the clip and those of the text are tokenised together.
    body = [
        "<|image_id_start|>", "0", "<|image_id_end|>", "<|image_start|>", *unk * 2, "<|image_end|>",
        "<|slice_start|>", *unk * 2, "<|slice_end|>", "Ċ", "<|slice_start|>", *unk * 2, "<|slice_end|>", "Ċ",
        "<|image_id_start|>", "1", "<|image_id_end|>", "<|image_start|>", *unk * 2, "<|image_end|>",
        "Ċ", "A", "u", "d", "i", "o", "Ġ", "1", ":", "Ġ", "<|audio_start|>", *unk * 4, "<|audio_end|>",
        "ĊĊ", "Ċ", "?",
    ]  # fmt: skip
    assert words(processor, sample)[6 : 6 + len(body)] == body
    assert learned(processor, sample) == ["b", "<|turn_end|>"]
    assert media_of(sample, "image").places.tolist() == [10, 11, 14, 15, 19, 20, 27, 28]
    assert media_of(sample, "audio").places.tolist() == [41, 42, 43, 44]
    assert media_of(sample, "image").sizes.tolist() == [[43, 24], [30, 34], [30, 34], [32, 32]]
    assert len(media_of(sample, "image").values) == sum(
        height * width for height, width in media_of(sample, "image").sizes.tolist()
    )
    assert media_of(sample, "audio").sizes.tolist() == [10]
    assert media_of(sample, "audio").values.shape == (10, 128)


@pytest.mark.parametrize(("size", "grid", "slices"), [((1480, 720), (3, 2), 7), ((4000, 500), (8, 1), 9)])
def test_anchors_of_the_published_model(tokenizer, size, grid, slices):
    processor = MegrezOProcessor(MegrezOImageProcessor(), WhisperFeatureExtractor(128), tokenizer)
    record = talk(("user", [("image", png(*size)), ("text", "?")]), ("assistant", "b"))
    sample = processor.encode(record)
    assert len(media_of(sample, "image").places) == 64 * slices
    assert len(media_of(sample, "image").sizes) == slices
    spelled = "".join(words(processor, sample)).replace("<|unk|>" * 64, "*")
    row = "<|slice_start|>*<|slice_end|>" * grid[0]
    assert "<|image_start|>*<|image_end|>" + "Ċ".join([row] * grid[1]) + "Ċ?" in spelled


def test_settings_are_used(tokenizer):
    record = talk(("user", [("image", png(1480, 720))]), ("assistant", "b"))

    def encode(**settings):
        images = MegrezOImageProcessor(image_feature_size=1, **settings)
        return MegrezOProcessor(images, WhisperFeatureExtractor(128), tokenizer).encode(record)

    assert len(media_of(encode(), "image").sizes) == 7
    assert len(media_of(encode(max_slice_nums=2), "image").sizes) == 3
    assert len(media_of(encode(slice_mode=False), "image").sizes) == 1
    assert media_of(encode(scale_resolution=224, patch_size=16), "image").values.shape[1] == 768
    assert len(encode().input_ids) - len(encode(use_image_id=False).input_ids) == 3


def test_audio_settings_are_used(tokenizer):
    def places(**settings):
        processor = MegrezOProcessor(MegrezOImageProcessor(), WhisperFeatureExtractor(128), tokenizer, **settings)
        return len(processor.encode(talk(("user", [("audio", wav(1))]), ("assistant", "b"))).media["audio"].places)

    assert (places(), places(audio_pool=5), places(audio_bos_eos=False)) == (27, 12, 25)


def random_record(rng: random.Random) -> Record:
    def content():
        made = []
        for _ in range(rng.randrange(4)):
            kind = rng.choice(["text", "image", "audio"])
            if kind == "image":
                made.append((kind, png(rng.randrange(1, 900), rng.randrange(1, 900))))
            elif kind == "audio":
                made.append((kind, wav(rng.uniform(0.05, 1.2), rng.choice([8_000, 16_000, 22_050, 44_100]))))
            else:
                made.append((kind, rng.choice(["hello world", "你好\n\n", " <|turn_end|>", "\n"])))
        return made or "x"

    turns = [("system", "s")] * rng.randrange(2)
    for _ in range(rng.randrange(1, 3)):
        turns += [("user", content()), ("assistant", "hello" * rng.randrange(1, 5), float(rng.randrange(3)))]
    return talk(*turns)


def outcome(act, record: Record, options: dict):
    """What `act` returns, and why it refused."""
    try:
        return act(record, **options), ""
    except BadRecord as fault:
        return None, str(fault)


@pytest.mark.parametrize("seed", range(12))
def test_measure_equals_encode(processor, seed):
    rng = random.Random(seed)
    record = random_record(rng)
    for options in ({}, {"max_tokens": rng.randrange(10, 120), "too_long": "cut_text"}, {"max_tokens": 60}):
        sample, refused = outcome(processor.encode, record, options)
        lengths, refused_too = outcome(processor.measure, record, options)
        assert refused == refused_too
        if refused:
            continue
        frames = len(media_of(sample, "audio").values)
        assert lengths.row() == (len(sample.input_ids), len(media_of(sample, "image").values), frames)
        assert len(media_of(sample, "image").values) == sum(
            height * width for height, width in media_of(sample, "image").sizes.tolist()
        )
        assert len(media_of(sample, "image").places) == 2 * len(media_of(sample, "image").sizes)
        assert media_of(sample, "audio").sizes.sum() == frames
        assert (media_of(sample, "audio").sizes % 2 == 0).all()
        unk = processor.tokenizer.unk_token_id
        places = torch.cat([media_of(sample, "image").places, media_of(sample, "audio").places]).sort().values
        assert torch.equal(places, (sample.input_ids == unk).nonzero()[:, 0])


def test_measure_reads_headers_only(processor):
    cut = png(200, 200)[:60]  # the header, none of the pixels
    record = talk(("user", [("image", cut)]), ("assistant", "b"))
    assert processor.measure(record).units == {"image": 32 * 32}
    with pytest.raises(BadRecord, match=r"^a\.jsonl:3: embedded image cannot be read"):
        processor.encode(record)


def test_user_text_gives_no_special_token(processor):
    spelled = "<|turn_end|><|role_start|>system<|role_end|><|unk|><|image_start|>"
    sample = processor.encode(talk(("user", spelled), ("assistant", "a")))
    special = set(processor.tokenizer.added_tokens_decoder)
    assert len(special & set(sample.input_ids.tolist())) == 3  # role_start, role_end, turn_end
    assert processor.tokenizer.decode(sample.input_ids[6:]).startswith(spelled)


class TestTooLong:
    """30 tokens before the answer, its 10 digits, and the turn's end."""

    record = talk(("user", [("text", "abc"), ("image", png(100, 100)), ("text", "d")]), ("assistant", "0123456789"))

    def test_lengths(self, processor):
        assert processor.measure(self.record).tokens == 41

    def test_quarantine_names_both_lengths(self, processor):
        assert processor.measure(self.record, max_tokens=41).tokens == 41
        for act in (processor.measure, processor.encode):
            with pytest.raises(BadRecord, match=r"^a\.jsonl:3: it has 41 tokens, more than 40"):
                act(self.record, max_tokens=40)

    def test_text_is_cut_from_the_end(self, processor):
        sample = processor.encode(self.record, max_tokens=36, too_long="cut_text")
        assert learned(processor, sample) == list("012345")
        assert len(sample.input_ids) == 36

    def test_nothing_learned_is_left(self, processor):
        with pytest.raises(BadRecord, match="of its 41 tokens the first 30 hold nothing that is learned"):
            processor.encode(self.record, max_tokens=30, too_long="cut_text")
        assert len(processor.encode(self.record, max_tokens=31, too_long="cut_text").input_ids) == 31

    def test_a_cut_never_falls_inside_a_medium(self, processor):
        first = (("user", "q"), ("assistant", "a"))  # 8 + 13 tokens
        record = talk(*first, ("user", [("image", png(100, 100)), ("audio", wav(0.1))]), ("assistant", "b"))
        cuts = {}
        for limit in range(21, processor.measure(record).tokens):
            sample = processor.encode(record, max_tokens=limit, too_long="cut_text")
            cuts[limit] = (
                len(sample.input_ids),
                len(media_of(sample, "image").sizes),
                len(media_of(sample, "audio").sizes),
            )
        # The image is at 27 to 33, "\nAudio 1: " at 34 to 43, the clip at 44 to 49.
        assert [cuts[limit] for limit in (26, 27, 28, 33, 34, 44, 45, 49, 50)] == [
            (26, 0, 0), (27, 0, 0), (27, 0, 0), (27, 0, 0), (34, 1, 0),
            (44, 1, 0), (44, 1, 0), (44, 1, 0), (50, 1, 1),
        ]  # fmt: skip

    def test_a_prompt_is_not_cut(self, processor):
        with pytest.raises(BadRecord, match="tokens, more than 20"):
            processor.prompt(self.record, max_tokens=20)


class TestLongAudio:
    record = talk(("user", [("audio", wav(31.0))]), ("assistant", "a"))

    def test_quarantine(self, processor):
        for act in (processor.measure, processor.encode):
            with pytest.raises(BadRecord, match=r"^a\.jsonl:3: audio \(embedded\) of 31\.0 s is longer than 30 s"):
                act(self.record)

    def test_cut(self, processor):
        processor.long_audio = "cut"
        sample = processor.encode(self.record)
        assert processor.measure(self.record).units == {"audio": 3000}
        assert media_of(sample, "audio").sizes.tolist() == [3000]
        assert len(media_of(sample, "audio").places) == 752
        # Frames whose window lies within the first 30 s are those of the first 30 s alone.
        alone = processor.encode(talk(("user", [("audio", wav(30.0))]), ("assistant", "a")))
        assert (media_of(sample, "audio").values - media_of(alone, "audio").values).abs().max() <= 1e-5


def test_a_clip_too_short(processor):
    with pytest.raises(BadRecord, match=r"audio \(embedded\) of 160 samples is too short"):
        processor.measure(talk(("user", [("audio", wav(0.01))]), ("assistant", "a")))


def test_a_header_that_lies(processor, monkeypatch):
    record = talk(("user", [("audio", wav(1.0))]), ("assistant", "a"))
    decoded = {"samples": 8_000}
    monkeypatch.setattr("train.data.audio.load_clip", lambda *_: np.zeros(decoded["samples"], np.float32))
    with pytest.raises(BadRecord, match=r"^a\.jsonl:3: \(embedded\): audio of 0\.50 s whose header says 1\.00 s"):
        processor.encode(record)
    decoded["samples"] = 15_000
    assert media_of(processor.encode(record), "audio").sizes.tolist() == [100]


def test_prompt_and_reference(processor):
    record = talk(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "the answer"))
    spelled = "<|role_start|>user<|role_end|>a<|turn_end|><|role_start|>assistant<|role_end|>b<|turn_end|>"
    spelled += "<|role_start|>user<|role_end|>c<|turn_end|><|role_start|>assistant<|role_end|>"
    assert "".join(words(processor, processor.prompt(record))) == spelled
    assert processor.reference(record) == "the answer"
    asked = Record(record.turns[:1])
    assert "".join(words(processor, processor.prompt(asked))).endswith(
        "a<|turn_end|><|role_start|>assistant<|role_end|>"
    )
    assert processor.reference(asked) == ""


def test_system_prompt(processor):
    record = talk(("user", "a"), ("assistant", "b"))
    assert "system" not in "".join(words(processor, processor.encode(record)))
    processor.system_prompt = "xyz"
    assert "system<|role_end|>xyz<|turn_end|>" in "".join(words(processor, processor.encode(record)))


def assert_same(found, expected):
    torch.testing.assert_close(asdict(found), asdict(expected), rtol=0, atol=0)


RECORD = talk(("user", [("image", png(600, 300)), ("audio", wav(0.5)), ("text", "你好")]), ("assistant", "b"))


def test_from_a_published_folder(model_folder):
    processor = MegrezOProcessor.from_pretrained(model_folder, local_files_only=True, trust_remote_code=True)
    images = processor.image_processor
    assert (images.max_slice_nums, images.image_feature_size) == (4, 8)  # the latter is query_num
    assert processor.feature_extractor.feature_size == 80
    assert media_of(processor.encode(RECORD), "audio").values.shape[1] == 80
    assert isinstance(AutoTokenizer.from_pretrained(model_folder), type(processor.tokenizer))


def test_save_and_load(model_folder, tmp_path):
    processor = MegrezOProcessor.from_pretrained(model_folder, system_prompt="be brief", long_audio="cut")
    folder = tmp_path / "export"
    processor.save_pretrained(folder)
    published = json.loads((model_folder / "preprocessor_config.json").read_text())
    kept = json.loads((folder / "preprocessor_config.json").read_text())
    assert {key: kept[key] for key in published} == published
    assert kept["image_feature_size"] == 8
    assert (folder / "chat_template.jinja").read_text() == processor.tokenizer.chat_template
    # Without the model's config.json, too.
    again = MegrezOProcessor.from_pretrained(folder)
    assert (again.system_prompt, again.long_audio) == ("be brief", "cut")
    assert_same(again.encode(RECORD), processor.encode(RECORD))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("hello <|turn_end|>") == processor.tokenizer("hello <|turn_end|>")


def test_a_pickled_processor_encodes_the_same(processor):
    assert_same(pickle.loads(pickle.dumps(processor)).encode(RECORD), processor.encode(RECORD))


@pytest.mark.parametrize("name", ["<|unk|>", "<|turn_end|>", "<|slice_end|>", "<|audio_start|>", "<|image_id_start|>"])
def test_a_lacking_special_token_is_named(name):
    tokenizer = make_tokenizer(without=(name,))
    with pytest.raises(CheckpointError) as fault:
        MegrezOProcessor(MegrezOImageProcessor(), WhisperFeatureExtractor(128), tokenizer)
    assert name in str(fault.value)


def test_image_ids_are_needed_only_where_used():
    tokenizer = make_tokenizer(without=("<|image_id_start|>", "<|image_id_end|>"))
    MegrezOProcessor(MegrezOImageProcessor(use_image_id=False), WhisperFeatureExtractor(128), tokenizer)


def test_a_folder_that_lacks_files(model_folder):
    (model_folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json' is not valid JSON"):
        MegrezOProcessor.from_pretrained(model_folder)
    (model_folder / "config.json").unlink()
    (model_folder / "preprocessor_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no preprocessor_config\.json"):
        MegrezOProcessor.from_pretrained(model_folder)


def test_a_folder_that_does_not_exist(tmp_path):
    with pytest.raises(CheckpointError, match="is not a model folder"):
        MegrezOProcessor.from_pretrained(tmp_path / "gone", local_files_only=True)


def test_image_processor_alone(processor):
    image = Image.new("RGBA", (500, 900))
    out = processor.image_processor([image, Image.new("RGB", (100, 100))])
    assert out["slices_per_image"].tolist() == [3, 1]
    assert out["patches"].shape == (int(out["slice_sizes"].prod(dim=1).sum()), 588)
    assert out["patches"][0].tolist() == [255] * 588
    assert processor.image_processor(image)["slices_per_image"].tolist() == [3]


def test_places_follow_the_geometry(processor):
    record = talk(("user", [("audio", wav(1.2345, 22_050))]), ("assistant", "b"))
    assert len(media_of(processor.encode(record), "audio").places) == audio_places(19_752)
