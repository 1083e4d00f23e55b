"""Text processors: what is learned of web searches and of MiniCPM's conversations, label by label."""

import json
import re
from datetime import datetime
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.runs import ROOT
from tests.unit.data.builders import make_tokenizer, png, talk
from train.data.functions import WEB_SEARCH, Call, Found, observation_text, read_call, system_text
from train.data.readers import open_source
from train.data.records import parse_record
from train.errors import BadRecord, CheckpointError
from train.families.megrez_instruct.processor import MegrezTextProcessor
from train.families.minicpm.processor import MiniCPMProcessor
from train.schema import IGNORE_INDEX, Sample

CALL = '<|function_start|>{"q":1}<|function_end|>'


@pytest.fixture(scope="module")
def megrez() -> MegrezTextProcessor:
    return MegrezTextProcessor(make_tokenizer(), system_prompt="")


@pytest.fixture(scope="module")
def minicpm() -> MiniCPMProcessor:
    return MiniCPMProcessor.from_pretrained(ROOT / "data/tiny_minicpm")


def shown(processor, sample: Sample) -> list[str]:
    """The tokens; those that are learned stand in brackets."""
    tokens = processor.tokenizer.convert_ids_to_tokens(sample.input_ids.tolist())
    for token, label in zip(sample.input_ids.tolist(), sample.labels.tolist(), strict=True):
        assert label in (token, IGNORE_INDEX)
    learned = (sample.labels != IGNORE_INDEX).tolist()
    return [f"[{token}]" if is_learned else token for token, is_learned in zip(tokens, learned, strict=True)]


def spelled(role: str) -> list[str]:
    return ["<|role_start|>", *role, "<|role_end|>"]


def test_a_web_search_is_learned_but_for_what_was_found(megrez):
    record = talk(
        ("system", "f"),
        ("user", "q"),
        ("assistant", CALL),
        ("observation", f"a{CALL}"),
        ("assistant", "a [c:1]"),
    )
    end = "<|turn_end|>"
    assert shown(megrez, megrez.encode(record)) == [
        *spelled("system"), "f", end,
        *spelled("user"), "q", end,
        *spelled("assistant"),
        "[<|function_start|>]", "[{]", '["]', "[q]", '["]', "[:]", "[1]", "[}]", "[<|function_end|>]", f"[{end}]",
        *spelled("observation"), "a", *CALL, end,
        *spelled("assistant"), "[a]", "[Ġ]", "[[]", "[c]", "[:]", "[1]", "[]]", f"[{end}]",
    ]  # fmt: skip


def test_labels_of_a_call_and_its_answer(megrez):
    """The same in numbers: a call and an answer of one token each between special ones."""
    call = "<|function_start|>x<|function_end|>"
    record = talk(("user", "q"), ("assistant", call), ("observation", "o"), ("assistant", "y"))
    x, y, start, end, turn_end = megrez.tokenizer.convert_tokens_to_ids(
        ["x", "y", "<|function_start|>", "<|function_end|>", "<|turn_end|>"]
    )
    assert megrez.encode(record).labels.tolist() == [
        *[-100] * (1 + 4 + 1 + 1 + 1),  # <start>user<end>q<turn_end>
        *[-100] * (1 + 9 + 1), start, x, end, turn_end,
        *[-100] * (1 + 11 + 1 + 1 + 1),
        *[-100] * (1 + 9 + 1), y, turn_end,
    ]  # fmt: skip


def test_without_functions_it_is_plain_chat(megrez):
    record = talk(("user", "q"), ("assistant", "a"))
    expected = [*spelled("user"), "q", "<|turn_end|>", *spelled("assistant"), "[a]", "[<|turn_end|>]"]
    assert shown(megrez, megrez.encode(record)) == expected


def test_every_record_of_the_search_sample_is_read_and_learned_as_meant():
    processor = MegrezTextProcessor.from_pretrained(ROOT / "data/tiny_instruct")
    source = open_source(ROOT / "data/websearch/heldout.jsonl")
    kinds = set()
    for row in range(len(source)):
        record = parse_record(source[row], root=ROOT, file="heldout", line=row)
        sample = processor.encode(record)
        learned = processor.tokenizer.decode(sample.input_ids[sample.labels != IGNORE_INDEX])
        expected = [str(turn.parts[0].content) for turn in record.turns if turn.role == "assistant"]
        assert learned == "<|turn_end|>".join(expected) + "<|turn_end|>"
        if record.type == "search":
            assert read_call(expected[0]).name == "web_search"
            assert re.search(r" \[citation:[123]\]\.$", expected[1])
        kinds.add(record.type)
    assert kinds == {"search", "direct", "plain"}


def test_minicpms_form(minicpm):
    record = talk(("user", " Repeat piano \n"), ("assistant", "piano "), ("user", "up"), ("assistant", "down"))
    form = ["▁", "<", "用户", ">"], ["<", "AI", ">"]
    assert shown(minicpm, minicpm.encode(record)) == [
        "<s>", *form[0], "Repeat", "▁piano", *form[1], "[▁piano]", "[</s>]",
        *form[0], "up", *form[1], "[▁down]", "[</s>]",
    ]  # fmt: skip
    asked = talk(("system", "Say the word."), ("user", "piano"))
    assert shown(minicpm, minicpm.encode(asked, generation_prompt=True)) == [
        "<s>", "▁Say", "▁the", "▁word", ".", "<", "用户", ">", "piano", "<", "AI", ">",
    ]  # fmt: skip


def test_a_tokenizer_that_adds_no_first_token_is_followed():
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "data/tiny_minicpm", add_bos_token=False)
    sample = MiniCPMProcessor(tokenizer).encode(talk(("user", "up"), ("assistant", "down")))
    assert tokenizer.decode(sample.input_ids) == "<用户>up<AI> down</s>"


@pytest.mark.parametrize("generation_prompt", [False, True])
@pytest.mark.parametrize("form", ["string", "list", "mapping"])
def test_minicpms_jinja_template_gives_the_same_ids(minicpm, form, generation_prompt):
    forms = {
        "string": lambda content: content,
        "list": lambda content: [{"type": "text", "text": content}],
        "mapping": lambda content: {"text": content},
    }
    turns = [("system", "Be brief."), ("user", "up?"), ("assistant", "down"), ("user", " 你好 ")]
    messages = [{"role": role, "content": forms[form](content)} for role, content in turns]
    ids = minicpm.tokenizer.apply_chat_template(messages, add_generation_prompt=generation_prompt)["input_ids"]
    assert minicpm.encode(talk(*turns), generation_prompt=generation_prompt).input_ids.tolist() == ids


def test_minicpms_published_data_are_read(minicpm, tmp_path: Path):
    file = tmp_path / "train.json"
    question, answer = "近期的天气怎么样？", "晴。"
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    file.write_text(json.dumps([{"messages": messages}] * 2, indent=2), encoding="utf-8")
    source = open_source(file)
    assert len(source) == 2
    record = parse_record(source[1], root=tmp_path, file="train.json", line=2)
    assert minicpm.tokenizer.decode(minicpm.encode(record).input_ids) == f"<s> <用户>{question}<AI> {answer}</s>"


@pytest.mark.parametrize("name", ["megrez", "minicpm"])
def test_media_are_refused(name, request):
    record = talk(("user", [("image", png(8, 8)), ("text", "?")]), ("assistant", "a"))
    processor = request.getfixturevalue(name)
    for use in (processor.measure, processor.encode, processor.prompt):
        with pytest.raises(BadRecord, match=r"^a.jsonl:3: it holds an image, and this model reads text alone"):
            use(record)


def test_a_role_that_the_model_does_not_know_is_refused(minicpm):
    with pytest.raises(BadRecord, match="have no role 'observation', only system, user, assistant"):
        minicpm.measure(talk(("user", "q"), ("observation", "o"), ("assistant", "a")))


def test_another_models_tokenizer_is_refused():
    with pytest.raises(CheckpointError, match=r"lacks the special token\(s\) <\|role_end\|>"):
        MegrezTextProcessor.from_pretrained(ROOT / "data/tiny_minicpm")


def test_the_system_turn_offers_functions():
    function = {"name": "web_search", "description": "搜索"}
    assert system_text([function], datetime(2026, 11, 20, 9, 5, 7)) == (
        "你是Megrez-3B-Instruct, 将针对用户的问题给出详细的、积极的回答.\n"
        "The current time is 2026-11-20 09:05:07, Friday.\n"
        "You have access to the following functions. Use them if required -\n"
        "[\n"
        "    {\n"
        '        "name": "web_search",\n'
        '        "description": "搜索"\n'
        "    }\n"
        "]"
    )
    assert WEB_SEARCH["name"] == "web_search"


@pytest.mark.parametrize(
    ("text", "call"),
    [
        (
            '<|function_start|>{"name": "f", "arguments": {"query": "茶"}}<|function_end|>',
            Call("f", {"query": "茶"}),
        ),
        ("So: " + Call("f", {}).text + " more", Call("f", {})),
        ('{"name": "f", "arguments": {}}', None),
        ('<|function_start|>{"name": "f", "arguments": {}}', None),
        ("<|function_start|>f()<|function_end|>", None),
        ('<|function_start|>{"name": "f"}<|function_end|>', None),
        ('<|function_start|>["name"]<|function_end|>', None),
        ('<|function_start|>{"name": "f", "arguments": "x"}<|function_end|>', None),
    ],
)
def test_calls_are_read(text, call):
    assert read_call(text) == call
    if call:
        assert read_call(call.text) == call


def test_results_are_numbered_as_they_are_cited():
    assert observation_text([Found("A", "one"), Found("B", "two")]) == "[1] A\none\n\n[2] B\ntwo"
    assert observation_text([]) == "Nothing was found."
