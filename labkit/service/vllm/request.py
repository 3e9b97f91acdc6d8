"""A checked request in vLLM's form."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

from labkit.common.images import to_png
from labkit.common.recordings import to_wav
from labkit.engine.action_grammar import LONGEST_STRING, action_rules
from labkit.service.engine_settings import longest_answer
from labkit.service.options import ServiceOptions
from labkit.service.schema_limits import narrowed
from labkit.service.schemas import ChatRequest
from labkit.service.tools import call_schema, describe, tool_use

_AS_THEY_ARE = (
    "model",
    "stream",
    "n",
    "temperature",
    "top_p",
    "seed",
    "stop",
    "frequency_penalty",
    "presence_penalty",
    "repetition_penalty",
    "logit_bias",
    "logprobs",
    "top_logprobs",
)


def translated(
    asked: ChatRequest,
    document: Mapping[str, Any],
    options: ServiceOptions,
    decoded: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """The body for vLLM: only fields that were checked, the lab's own ones translated.

    ``decoded`` are the messages with images and recordings loaded (`labkit.service.conversation.lab_messages`). vLLM
    gets these and not the client's files, which it would read in its own way: transparency, 16 bits, orientation.

    Raises:
        ApiError: tools that do not go together.
    """
    body = {name: document[name] for name in _AS_THEY_ARE if document.get(name) is not None}
    body.setdefault("temperature", 0)
    if asked.top_k is not None:
        body["top_k"] = asked.top_k if asked.top_k > 0 else -1
    tokens = longest_answer(asked, options)
    body["max_tokens"] = tokens
    if asked.stream:
        body["stream_options"] = {"include_usage": True}
    body["messages"] = _messages(document["messages"], decoded)
    thinking = options.thinking if asked.thinks is None else asked.thinks
    body["chat_template_kwargs"] = {**(asked.chat_template_kwargs or {}), "enable_thinking": thinking}
    tools = tool_use(asked)
    if tools.functions:
        body["messages"] = [{"role": "system", "content": describe(tools)}, *body["messages"]]
    if tools.must:
        body["structured_outputs"] = {"json": narrowed(call_schema(tools.functions), tokens)}
    elif (wanted := asked.response_format) is not None:
        if wanted.type == "json_object":
            body["response_format"] = {"type": "json_object"}
        elif wanted.type == "json_schema":
            body["structured_outputs"] = {"json": narrowed(wanted.json_schema.schema_, tokens)}
        elif wanted.type == "action":
            body["structured_outputs"] = {"grammar": action_grammar(thinking)}
    return body


def action_grammar(thinking: bool) -> str:
    """The action syntax for vLLM's guidance back end; tags are letters there."""
    think = '("<think>" THOUGHT "</think>")? ' if thinking else ""
    lines = [f"start: {think}body", action_rules('"<answer>"', '"</answer>"', LONGEST_STRING)]
    if think:
        lines.append("THOUGHT: /[^<]{0,600}/")
    return "\n".join(lines)


def _messages(
    messages: Sequence[Mapping[str, Any]], decoded: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The messages, with the loaded images and recordings in place of files and addresses: vLLM fetches nothing."""
    made = []
    for message, loaded in zip(messages, decoded):
        content = message.get("content")
        if content is None:
            content = message.get("refusal")
        if isinstance(content, list) and isinstance(loaded["content"], list):
            content = [_part(part, media) for part, media in zip(content, loaded["content"])]
        made.append({"role": message["role"], "content": content or ""})
        for call in message.get("tool_calls") or ():
            made[-1]["content"] += f"\n{call['function']['name']}({call['function']['arguments']})"
        if message["role"] == "tool":
            made[-1] = {"role": "user", "content": f"Result of {message['tool_call_id']}: {content}"}
    return made


def _part(part: Mapping[str, Any], loaded: Mapping[str, Any]) -> Mapping[str, Any]:
    if part["type"] == "refusal":
        return {"type": "text", "text": part["refusal"]}
    if loaded["type"] == "image":
        data = base64.b64encode(to_png(loaded["image"])).decode()
        return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
    if loaded["type"] == "audio":
        data = base64.b64encode(to_wav(loaded["audio"])).decode()
        return {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}
    return part
