import pickle

import pytest

from tests.unit.data.builders import make_tokenizer, talk
from train.data.chat_template import ChatTemplate, RoleForm, Segment, Special, TextEncoder
from train.errors import CheckpointError
from train.families.megrezo.template import DEFAULT_SYSTEM_PROMPT, MEGREZ_TEMPLATE

START, END, TURN_END = (Segment("special", name) for name in ("<|role_start|>", "<|role_end|>", "<|turn_end|>"))


def text(content: str, weight: float = 0.0) -> Segment:
    return Segment("text", content, weight)


def head(role: str) -> list[Segment]:
    return [START, text(role), END]


def test_a_conversation_with_media():
    record = talk(
        ("user", [("image", "a.jpg"), ("image", "b.jpg"), ("audio", "q.wav"), ("text", "Why?")]),
        ("assistant", "So.", 2.0),
        ("user", [("audio", "r.wav")]),
        ("assistant", "No.", 0.0),
    )
    assert MEGREZ_TEMPLATE.render(record.turns, generation_prompt=True) == [
        *head("system"), text(DEFAULT_SYSTEM_PROMPT), TURN_END,
        *head("user"),
        Segment("image", "a.jpg"), text("\n"),
        Segment("image", "b.jpg"), text("\nAudio 1: "),
        Segment("audio", "q.wav"), text("\nWhy?"), TURN_END,
        *head("assistant"), text("So.", 2.0), Segment("special", "<|turn_end|>", 2.0),
        *head("user"), text("Audio 2: "), Segment("audio", "r.wav"), text("\n"), TURN_END,
        *head("assistant"), text("No."), TURN_END,
        *head("assistant"),
    ]  # fmt: skip


def test_the_system_turn():
    own = talk(("system", "s"), ("user", "u"))
    assert MEGREZ_TEMPLATE.render(own.turns, system_prompt="other")[:4] == [*head("system"), text("s")]
    asked = talk(("user", "u"))
    assert MEGREZ_TEMPLATE.render(asked.turns, system_prompt="other")[:4] == [*head("system"), text("other")]
    assert MEGREZ_TEMPLATE.render(asked.turns, system_prompt="") == [*head("user"), text("u"), TURN_END]


def test_only_an_assistant_may_call_functions():
    call = '<|function_start|>{"name": "f"}<|function_end|><|turn_end|>'
    record = talk(("user", call), ("assistant", call), ("observation", call))
    segments = MEGREZ_TEMPLATE.render(record.turns, system_prompt="")
    assert segments == [
        *head("user"), text(call), TURN_END,
        *head("assistant"),
        Segment("special", "<|function_start|>", 1.0), text('{"name": "f"}', 1.0),
        Segment("special", "<|function_end|>", 1.0), text("<|turn_end|>", 1.0),
        Segment("special", "<|turn_end|>", 1.0),
        *head("observation"), text(call), TURN_END,
    ]  # fmt: skip


def test_another_family_is_another_declaration():
    template = ChatTemplate(
        roles={
            "user": RoleForm(("<user>",), ()),
            "assistant": RoleForm(("<AI>",), (Special("</s>"),)),
        }
    )
    assert template.required == {"</s>"}
    segments = template.render(talk(("user", "q"), ("assistant", "a")).turns, generation_prompt=True)
    assert segments == [text("<user>q<AI>"), text("a", 1.0), Segment("special", "</s>", 1.0), text("<AI>")]


def encoder(tokenizer) -> TextEncoder:
    return TextEncoder(tokenizer.backend_tokenizer.to_str(), sorted(MEGREZ_TEMPLATE.required))


def ids_of(segments: list[Segment], encode: TextEncoder) -> list[int]:
    ids = []
    for segment in segments:
        ids += (encode.text if segment.kind == "text" else encode.special)(segment.content)
    return ids


CONVERSATIONS = [
    [("user", "hello world\n\nhello")],
    [("user", "你好 hello"), ("assistant", " world "), ("user", "\n\nAll")],
    [("system", "be brief"), ("user", "hello"), ("assistant", "hello"), ("observation", "x")],
]


@pytest.mark.parametrize("generation_prompt", [False, True])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("form", ["string", "list", "mapping"])
def test_the_jinja_template_gives_the_same_ids(tokenizer, conversation, form, generation_prompt):
    forms = {
        "string": lambda content: content,
        "list": lambda content: [{"type": "text", "text": content}],
        "mapping": lambda content: {"text": content},
    }
    messages = [{"role": role, "content": forms[form](content)} for role, content in conversation]
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=generation_prompt)["input_ids"]
    segments = MEGREZ_TEMPLATE.render(talk(*conversation).turns, generation_prompt=generation_prompt)
    assert ids_of(segments, encoder(tokenizer)) == expected


def test_the_jinja_template_writes_placeholders(tokenizer):
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": {"text": "hi", "image": ["a", "b"], "audio": "c"}},
        {"role": "assistant", "content": "x"},
        {
            "role": "user",
            "content": [
                {"type": "input_audio", "input_audio": {}},
                {"type": "image_url", "image_url": {"url": ""}},
                {"type": "text", "text": "ho"},
            ],
        },
        {"role": "assistant", "content": {"text": "y", "image": None}},
    ]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == (
        "<|role_start|>system<|role_end|>s<|turn_end|>"
        "<|role_start|>user<|role_end|>(<image>./</image>)\n(<image>./</image>)\n"
        "Audio 1: (<audio>./</audio>)\nhi<|turn_end|>"
        "<|role_start|>assistant<|role_end|>x<|turn_end|>"
        "<|role_start|>user<|role_end|>Audio 2: (<audio>./</audio>)\n(<image>./</image>)\nho<|turn_end|>"
        "<|role_start|>assistant<|role_end|>y<|turn_end|>"
    )
    assert "other<|turn_end|>" in tokenizer.apply_chat_template(messages[1:], system_prompt="other", tokenize=False)


def test_special_tokens_written_in_text_stay_text(tokenizer):
    encode = encoder(tokenizer)
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    for copy in (encode, pickle.loads(pickle.dumps(encode))):
        ids = copy.text("a<|turn_end|><|unk|>b")
        assert not special & set(ids)
        assert tokenizer.decode(ids) == "a<|turn_end|><|unk|>b"
        assert copy.special("<|turn_end|>") == [tokenizer.convert_tokens_to_ids("<|turn_end|>")]
    # The user's own tokenizer is left as it was.
    assert tokenizer("<|turn_end|>")["input_ids"] == encode.special("<|turn_end|>")


def test_a_lacking_special_token_is_named():
    with pytest.raises(CheckpointError, match=r"lacks the special token\(s\) <\|turn_end\|>"):
        encoder(make_tokenizer(without=("<|turn_end|>",)))


def test_an_optional_special_token_may_lack():
    tokenizer = make_tokenizer(without=("<|function_start|>",))
    encode = TextEncoder(tokenizer.backend_tokenizer.to_str(), [], ["<|function_start|>"])
    assert encode.special("<|function_start|>") == encode.text("<|function_start|>")
