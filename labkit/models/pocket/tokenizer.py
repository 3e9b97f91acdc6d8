"""The pocket model's tokenizer: byte-level BPE as GLM's, trained on PhoneTap's words.

Every Chinese character is a token (labels are read character by character), every number from 0 to 999 is a token
(so is every coordinate), and the special tokens have the 9 B model's names.
"""

from __future__ import annotations

SPECIAL_TOKENS = (
    "<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<|system|>", "<|user|>", "<|assistant|>",
    "<|observation|>", "<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>",
    "<|begin_of_audio|>", "<|end_of_audio|>", "<|image|>", "<|video|>", "<|audio|>",
)  # fmt: skip
MARKS = ("<think>", "</think>", "<answer>", "</answer>")  # single tokens that are text: decoding keeps them
VOCAB_SIZE = 3584
_PATTERN = r"\p{Han}|\p{N}{1,3}| ?[A-Za-z\p{Latin}']+| ?[^\s\p{L}\p{N}]+|\s+|."

CHAT_TEMPLATE = """[gMASK]<sop>
{%- for message in messages %}
{%- if message.role == 'user' %}<|user|>
{% if message.content is string %}{{ message.content }}
{%- else %}{% for part in message.content %}
{%- if part.type in ('image', 'image_url') %}<|begin_of_image|><|image|><|end_of_image|>
{%- elif part.type in ('audio', 'input_audio') %}<|begin_of_audio|><|audio|><|end_of_audio|>
{%- elif part.type == 'text' %}{{ part.text }}{% endif %}
{%- endfor %}{% endif %}
{%- elif message.role == 'assistant' %}<|assistant|>
{{ message.content }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|assistant|>
{% if not enable_thinking %}<think></think>{% endif %}{% endif %}"""
