"""vLLM's answers in the service's form: thinking split off as asked, calls recognized, usage only where wanted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from labkit.service.choice import ChoiceReader, News, thinks_apart
from labkit.service.scheduler import Event
from labkit.service.schemas import ChatRequest
from labkit.service.tools import tool_use


class ReplyTranslator:
    """Translates one answer."""

    def __init__(self, asked: ChatRequest):
        self._asked = asked
        self._tools = tool_use(asked)
        self._apart = thinks_apart(asked, self._tools)
        self._readers: dict[int, ChoiceReader] = {}

    def whole(self, answer: dict[str, Any]) -> dict[str, Any]:
        """An answer that came whole."""
        for choice in answer["choices"]:
            message, reader = choice["message"], self._reader(choice["index"])
            reader.read(self._event(choice, message, choice["finish_reason"]))
            fields: dict[str, Any] = {"role": "assistant", "content": reader.content, "refusal": None}
            if reader.reasoning:
                fields |= {"reasoning_content": reader.reasoning, "reasoning": reader.reasoning}
            if reader.tool_call is not None:
                fields |= {"content": None, "tool_calls": [reader.tool_call.model_dump(exclude_unset=True)]}
            choice["message"], choice["finish_reason"] = fields, reader.finish_reason
        return self._named(answer)

    def chunks(self, chunk: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """What one event of a stream becomes: none, one, or a few."""
        if not chunk["choices"]:
            options = self._asked.stream_options
            if options and options.include_usage:
                yield self._named(chunk)
            return
        common = {name: value for name, value in chunk.items() if name not in ("choices", "usage")}
        for choice in chunk["choices"]:
            if "role" in choice["delta"]:
                yield self._chunk(common, choice, {"role": "assistant", "content": ""})
            news = self._reader(choice["index"]).read(
                self._event(choice, choice["delta"], choice.get("finish_reason"))
            )
            yield from self._deltas(common, choice, news)

    def _deltas(self, common: dict[str, Any], choice: dict[str, Any], news: News) -> Iterator[dict[str, Any]]:
        if news.reasoning:
            yield self._chunk(
                common, choice, {"reasoning_content": news.reasoning, "reasoning": news.reasoning}
            )
        if news.content:
            yield self._chunk(common, choice, {"content": news.content}, choice.get("logprobs"))
        if news.tool_call is not None:
            call = {**news.tool_call.model_dump(exclude_unset=True), "index": 0}
            yield self._chunk(common, choice, {"tool_calls": [call]})
        if news.finish_reason is not None:
            yield self._chunk(common, choice, {}, finish_reason=news.finish_reason)

    def _chunk(
        self,
        common: dict[str, Any],
        choice: dict[str, Any],
        delta: dict[str, Any],
        logprobs: Any = None,
        finish_reason: str | None = None,
    ) -> dict[str, Any]:
        made = {
            "index": choice["index"],
            "delta": delta,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
        }
        return self._named({**common, "choices": [made]})

    def _reader(self, index: int) -> ChoiceReader:
        if index not in self._readers:
            self._readers[index] = ChoiceReader(
                index, apart=self._apart, tools=self._tools, tags=self._asked.keeps_tags
            )
        return self._readers[index]

    @staticmethod
    def _event(choice: dict[str, Any], message: dict[str, Any], finish_reason: str | None) -> Event:
        known = {"stop": "stop", "length": "length", None: None}
        return Event(
            choice["index"], message.get("content") or "", finish_reason=known.get(finish_reason, "stop")
        )

    def _named(self, answer: dict[str, Any]) -> dict[str, Any]:
        return {**answer, "model": self._asked.model}
