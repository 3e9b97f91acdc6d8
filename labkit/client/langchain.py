"""LangChain's `ChatOpenAI`, with the thinking kept.

The article's client is plain `ChatOpenAI`, and works as it is. It drops the field ``reasoning_content`` without a
word, because it is none of OpenAI's; this subclass keeps it in ``message.additional_kwargs["reasoning_content"]``,
whole and streamed, and so in ``message.content_blocks`` as a block of the type ``reasoning``.

    from labkit.client.langchain import ReasoningChatOpenAI

    model = ReasoningChatOpenAI(
        model="autoglm-phone-9b", base_url="http://127.0.0.1:8000/v1", api_key="EMPTY",
        extra_body={"enable_thinking": True, "return_reasoning": True},
    )
    model.invoke("你是谁?").additional_kwargs["reasoning_content"]
"""

from __future__ import annotations

from typing import Any

import openai
from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_core.outputs import ChatGenerationChunk, ChatResult
from langchain_openai import ChatOpenAI
from pydantic import model_validator

from labkit.client.reply import trusts_environment

FIELD = "reasoning_content"


class ReasoningChatOpenAI(ChatOpenAI):
    """See the module. On the way to this machine no proxy variable applies."""

    @model_validator(mode="before")
    @classmethod
    def _no_proxy_to_this_machine(cls, data: Any) -> Any:
        url = data.get("base_url") or data.get("openai_api_base") if isinstance(data, dict) else None
        if url and not trusts_environment(str(url)):
            data.setdefault("http_client", openai.DefaultHttpxClient(trust_env=False))
            data.setdefault("http_async_client", openai.DefaultAsyncHttpxClient(trust_env=False))
        return data

    def _create_chat_result(self, response: Any, generation_info: dict | None = None) -> ChatResult:
        result = super()._create_chat_result(response, generation_info)
        told = response if isinstance(response, dict) else response.model_dump(warnings=False)
        for generation, choice in zip(result.generations, told["choices"]):
            thought = choice["message"].get(FIELD) or choice["message"].get("reasoning")
            if isinstance(generation.message, AIMessage):
                _keep(generation.message, thought)
        return result

    def _convert_chunk_to_generation_chunk(
        self, chunk: dict, default_chunk_class: type, base_generation_info: dict | None
    ) -> ChatGenerationChunk | None:
        made = super()._convert_chunk_to_generation_chunk(chunk, default_chunk_class, base_generation_info)
        choices = chunk.get("choices") or ()
        delta = (choices[0].get("delta") or {}) if choices else {}
        thought = delta.get(FIELD) or delta.get("reasoning")
        if made is not None and isinstance(made.message, AIMessageChunk):
            _keep(made.message, thought)
        return made


def _keep(message: AIMessage, thought: str | None) -> None:
    if thought:
        message.additional_kwargs[FIELD] = thought
    message.response_metadata["model_provider"] = "labkit"  # of OpenAI, LangChain expects no such field
