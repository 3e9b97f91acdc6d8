"""LangChain's `ChatOpenAI` that keeps the model's reasoning.

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
    """`ChatOpenAI` that keeps ``reasoning_content`` in ``message.additional_kwargs``, whole and streamed.

    ``message.content_blocks`` then holds it as a block of the type ``reasoning``. Plain `ChatOpenAI` drops the field
    silently, because OpenAI does not define it. Proxy variables do not apply to a service on this machine.
    """

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
        body = response if isinstance(response, dict) else response.model_dump(warnings=False)
        for generation, choice in zip(result.generations, body["choices"]):
            reasoning = choice["message"].get(FIELD) or choice["message"].get("reasoning")
            if isinstance(generation.message, AIMessage):
                _keep(generation.message, reasoning)
        return result

    def _convert_chunk_to_generation_chunk(
        self, chunk: dict, default_chunk_class: type, base_generation_info: dict | None
    ) -> ChatGenerationChunk | None:
        generated = super()._convert_chunk_to_generation_chunk(
            chunk, default_chunk_class, base_generation_info
        )
        choices = chunk.get("choices") or ()
        delta = (choices[0].get("delta") or {}) if choices else {}
        reasoning = delta.get(FIELD) or delta.get("reasoning")
        if generated is not None and isinstance(generated.message, AIMessageChunk):
            _keep(generated.message, reasoning)
        return generated


def _keep(message: AIMessage, reasoning: str | None) -> None:
    if reasoning:
        message.additional_kwargs[FIELD] = reasoning
    message.response_metadata["model_provider"] = (
        "labkit"  # LangChain expects no such field from the provider "openai"
    )
