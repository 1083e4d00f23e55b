"""How the Megrez models write a conversation."""

from train.data.chat_template import ChatTemplate, RoleForm, Special

DEFAULT_SYSTEM_PROMPT = "你是Megrez-3B-Instruct，将针对用户的问题给出详细的、积极的回答。"


def _megrez_role(role: str, content_specials: tuple[str, ...] = ()) -> RoleForm:
    before = (Special("<|role_start|>"), role, Special("<|role_end|>"))
    return RoleForm(before, (Special("<|turn_end|>"),), content_specials)


MEGREZ_TEMPLATE = ChatTemplate(
    roles={
        "system": _megrez_role("system"),
        "user": _megrez_role("user"),
        "assistant": _megrez_role("assistant", ("<|function_start|>", "<|function_end|>")),
        "observation": _megrez_role("observation"),
    },
    default_system_prompt=DEFAULT_SYSTEM_PROMPT,
)

CHAT_TEMPLATE_JINJA = (
    """\
{%- set count = namespace(audio=0) -%}
{%- macro image() %}{{ '(<image>./</image>)\\n' }}{% endmacro -%}
{%- macro audio() %}{% set count.audio = count.audio + 1 %}\
{{ 'Audio ' ~ count.audio ~ ': (<audio>./</audio>)\\n' }}{% endmacro -%}
{%- macro amount(value) %}\
{{ 0 if value is none else 1 if value is string or value is mapping else value | length }}{% endmacro -%}
{%- if not messages or messages[0]['role'] != 'system' -%}
{{- '<|role_start|>system<|role_end|>' ~ (system_prompt | default('SYSTEM_PROMPT')) ~ '<|turn_end|>' -}}
{%- endif -%}
{%- for message in messages -%}
{{- '<|role_start|>' ~ message['role'] ~ '<|role_end|>' -}}
{%- set content = message['content'] -%}
{%- if content is string -%}
{{- content -}}
{%- elif content is mapping -%}
{%- for _ in range(amount(content.get('image')) | int) -%}{{- image() -}}{%- endfor -%}
{%- for _ in range(amount(content.get('audio')) | int) -%}{{- audio() -}}{%- endfor -%}
{{- content.get('text') or '' -}}
{%- else -%}
{%- for item in content -%}
{%- if item['type'] == 'text' -%}{{- item['text'] -}}
{%- elif item['type'] in ('image', 'image_url') -%}{{- image() -}}
{%- else -%}{{- audio() -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|turn_end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|role_start|>assistant<|role_end|>' -}}
{%- endif -%}
"""
).replace("SYSTEM_PROMPT", DEFAULT_SYSTEM_PROMPT)
"""MEGREZ_TEMPLATE for `tokenizer.apply_chat_template`, with the published placeholders of media."""
