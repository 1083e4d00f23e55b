"""How MiniCPM writes a conversation."""

from train.data.chat_template import ChatTemplate, RoleForm, Special

MINICPM_TEMPLATE = ChatTemplate(
    roles={
        "system": RoleForm((), ()),
        "user": RoleForm(("<用户>",), ("<AI>",)),
        "assistant": RoleForm((), (Special("</s>"),)),
    },
    strips_texts=True,
)
"""As published, where turns of a conversation stand without anything between them, and with what its chat template
leaves out: each answer ends with the end-of-sequence token, so that the model learns where to stop."""

MINICPM_TEMPLATE_JINJA = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- set content = message['content'] -%}
{%- if content is mapping -%}{%- set content = content['text'] -%}
{%- elif content is not string -%}{%- set content = content | map(attribute='text') | join -%}
{%- endif -%}
{%- if message['role'] == 'user' -%}
{{- '<用户>' ~ content.strip() ~ '<AI>' -}}
{%- elif message['role'] == 'assistant' -%}
{{- ' ' ~ content.strip() ~ eos_token -}}
{%- else -%}
{{- content.strip() -}}
{%- endif -%}
{%- endfor -%}
"""
"""MINICPM_TEMPLATE for `tokenizer.apply_chat_template`; the space is the one that sentencepiece begins a text with."""
