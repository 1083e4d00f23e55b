"""How Qwen2.5-Omni writes a conversation."""

from train.data.chat_template import ChatTemplate, RoleForm, Special

DEFAULT_SYSTEM_PROMPT = "You are a helpful assistant."


def _role(role: str) -> RoleForm:
    return RoleForm((Special("<|im_start|>"), f"{role}\n"), (Special("<|im_end|>"), "\n"))


QWEN_OMNI_TEMPLATE = ChatTemplate(
    roles={role: _role(role) for role in ("system", "user", "assistant")},
    default_system_prompt=DEFAULT_SYSTEM_PROMPT,
    audio_prefix="",
    media_suffix="",
)

CHAT_TEMPLATE_JINJA = """\
{%- macro media(kind) -%}
{%- if kind.startswith('image') -%}<|vision_bos|><|IMAGE|><|vision_eos|>
{%- elif kind.startswith('video') -%}<|vision_bos|><|VIDEO|><|vision_eos|>
{%- else -%}<|audio_bos|><|AUDIO|><|audio_eos|>
{%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
{%- if loop.first and message['role'] != 'system' -%}
{{- '<|im_start|>system\\nSYSTEM_PROMPT<|im_end|>\\n' -}}
{%- endif -%}
{{- '<|im_start|>' ~ message['role'] ~ '\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for item in message['content'] -%}
{%- if item['type'] == 'text' -%}{{- item['text'] -}}
{%- else -%}{{- media(item['type']) -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
""".replace("SYSTEM_PROMPT", DEFAULT_SYSTEM_PROMPT)
"""QWEN_OMNI_TEMPLATE for `tokenizer.apply_chat_template`, with the published placeholders of media."""
