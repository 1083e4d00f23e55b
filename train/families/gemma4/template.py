"""How Gemma 4 E2B and E4B write a conversation, without thinking and tools."""

from train.data.chat_template import ChatTemplate, RoleForm, Special


def _role(name: str) -> RoleForm:
    return RoleForm((Special("<|turn>"), f"{name}\n"), (Special("<turn|>"), "\n"))


GEMMA4_TEMPLATE = ChatTemplate(
    roles={"system": _role("system"), "user": _role("user"), "assistant": _role("model")},
    audio_prefix="",
    media_suffix="",
    strips_texts=True,
)

CHAT_TEMPLATE_JINJA = """\
{{- bos_token -}}
{%- for message in messages -%}
{{- '<|turn>' ~ ('model' if message['role'] == 'assistant' else message['role']) ~ '\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] | trim -}}
{%- else -%}
{%- for item in message['content'] -%}
{%- if item['type'] == 'text' -%}{{- item['text'] | trim -}}
{%- elif item['type'].startswith('image') -%}{{- '<|image|>' -}}
{%- else -%}{{- '<|audio|>' -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<turn|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|turn>model\\n' -}}
{%- endif -%}
"""
"""GEMMA4_TEMPLATE for `tokenizer.apply_chat_template`, with the published placeholders of media."""
