"""One choice of an answer while its events come: thinking split off, log-probabilities kept, calls recognized."""

from __future__ import annotations

from dataclasses import dataclass, field

from labkit.common.marks import OPEN
from labkit.engine.grammar import Grammars
from labkit.engine.sampling import TokenLogprobs
from labkit.service.reasoning import ReasoningSplitter, TagFilter
from labkit.service.replies import TokenLogprob, ToolCall, TopLogprob
from labkit.service.scheduler import Event
from labkit.service.schemas import ChatRequest
from labkit.service.tools import ToolUse, as_tool_call, may_be_call

NO_TOOLS = ToolUse()


def thinks_apart(request: ChatRequest, tools: ToolUse) -> bool:
    """Whether thinking goes into a field of its own; else it stays in the content as it was written.

    It does where a request asks for it, where the content is JSON or may become a call, and where a model thinks that
    was told not to.
    """
    return bool(request.splits_reasoning or request.wants_json or tools.functions or request.thinks is False)


@dataclass
class News:
    """What an event adds to a choice for its reader."""

    index: int
    content: str = ""
    reasoning: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    tool_call: ToolCall | None = None
    finish_reason: str | None = None

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to send."""
        return not (self.content or self.reasoning or self.tool_call or self.finish_reason)


class ChoiceReader:
    """Reads the events of one choice.

    Args:
        index: its place.
        apart: give the thinking in a field of its own; see `thinks_apart`.
        opened: the prompt ended in ``<think>``.
        tools: what the answer may call; a call is told whole at its end. Where the request named the function,
            the finish reason is ``stop``, as OpenAI's is.
        tags: leave ``<answer>`` and ``</answer>`` in the content.
        grammars: knows tokens' bytes, where log-probabilities are wanted.
    """

    def __init__(
        self,
        index: int,
        *,
        apart: bool = False,
        opened: bool = False,
        tools: ToolUse = NO_TOOLS,
        tags: bool = True,
        grammars: Grammars | None = None,
    ):
        self.index = index
        self.content = ""
        self.reasoning = ""
        self.tokens = 0
        self.reasoning_tokens = 0
        self.logprobs: list[TokenLogprob] = []
        self.tool_call: ToolCall | None = None
        self.finish_reason: str | None = None
        self._splitter = ReasoningSplitter(opened)
        self._apart = apart
        self._prefix = OPEN if opened and not apart else ""
        self._tools = tools
        self._filter = None if tags or tools.must else TagFilter()
        self._grammars = grammars
        self._pending: list[TokenLogprob] = []
        self._of_thought: list[TokenLogprob] = []  # given out only if the thought becomes the answer
        self._call_text = ""

    def read(self, event: Event) -> News:
        """Take one event that is no error."""
        if event.token is not None:
            self.tokens += 1
        thinking, thought, content = self._split(event)
        self.reasoning_tokens += thinking and event.token is not None
        if event.logprobs is not None and not event.is_end:
            hidden = self._apart and thinking
            (self._of_thought if hidden else self._pending).append(self._entries(event.logprobs))
        if event.finish_reason == "stop" and self._apart and self._splitter.unfinished:
            # The model has ended without closing its thinking: that was its answer.
            content, self._pending = self._splitter.unfinished, self._of_thought
        if not self._splitter.thinking:
            self._of_thought = []
        news = News(self.index, content, thought, finish_reason=event.finish_reason)
        if self._tools.functions:
            self._read_call(news)
        if self._filter is not None:
            news.content = self._filter.push(news.content)
            if event.finish_reason is not None:
                news.content += self._filter.flush()
        if not news.is_empty:
            news.logprobs, self._pending = self._pending, []
        self.content += news.content
        self.reasoning += news.reasoning
        self.logprobs += news.logprobs
        self.finish_reason = news.finish_reason
        return news

    def _split(self, event: Event) -> tuple[bool, str, str]:
        """Whether an event belongs to the thinking, and what it adds to the thinking and to the content."""
        thinking = self._splitter.thinking
        thought, content = self._splitter.push(event.text)
        if event.finish_reason is not None:
            held_thought, held = self._splitter.flush()
            thought, content = thought + held_thought, content + held
        if not self._apart:
            thought, content, self._prefix = "", self._prefix + event.text, ""
        return thinking or self._splitter.thinking, thought, content

    def _read_call(self, news: News) -> None:
        """Hold the content back while it can be a call."""
        self._call_text, news.content = self._call_text + news.content, ""
        if not self._tools.must and not may_be_call(self._call_text):
            news.content, self._call_text, self._tools = self._call_text, "", NO_TOOLS
            return
        if news.finish_reason is None:
            return
        self.tool_call = news.tool_call = as_tool_call(self._call_text, self._tools.names)
        if self.tool_call is None:
            news.content = self._call_text
        elif news.finish_reason == "stop" and not self._tools.named:
            news.finish_reason = "tool_calls"

    def _entries(self, logprobs: TokenLogprobs) -> TokenLogprob:
        top = [self._entry(token, logprob) for token, logprob in logprobs.top]
        chosen = self._entry(logprobs.token, logprobs.logprob)
        return TokenLogprob(**chosen.model_dump(), top_logprobs=top)

    def _entry(self, token: int, logprob: float) -> TopLogprob:
        raw = self._grammars.bytes_of(token)
        # JSON has no minus infinity; this is what OpenAI gives for what cannot come.
        return TopLogprob(
            token=raw.decode("utf-8", "replace"), logprob=max(logprob, -9999.0), bytes=list(raw)
        )
