"""Grammars that an answer cannot leave: the lab's action syntax, JSON, JSON of a schema. No torch at import.

At each token llguidance says which tokens may come next; all others get a logit of minus infinity. An answer
under the action grammar always parses (`labkit.common.actions.parse_answer`): its strings and its thinking are kept
so short that it ends within the tokens it may have. A free JSON object is closed when the room for more runs out.

llguidance (MIT) is the engine of choice: one wheel of 3 MB without dependencies, used by vLLM and llama.cpp;
xgrammar would bring triton, outlines-core knows no context-free grammars.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from labkit.common.actions import ACTIONS
from labkit.common.errors import GrammarError
from labkit.common.marks import ANSWER_CLOSE, ANSWER_OPEN, CLOSE, OPEN
from labkit.engine.action_grammar import LONGEST_STRING, action_rules
from labkit.engine.grammar_tokenizer import GrammarTokenizer
from labkit.engine.json_schema import Json, literal_texts, object_rule, patterns, schema_rule
from labkit.engine.matcher import Matcher, short_reason

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FORMATS = ("json_object", "json_schema", "action")
LEAST_TOKENS = 256
"""Tokens that an answer under the action grammar must be allowed."""
_SKELETON_TOKENS = 96  # an action without its strings, and the marks around it, should every byte be a token
_TOKENS_A_CHARACTER = 4  # at most, byte by byte
_LONGEST = {"string": LONGEST_STRING, "thought": 600}  # characters
# What every answer of a format is made of.
_NEEDED = {
    "action": 'do(finish(="[,])0123456789' + "".join(ACTIONS),
    "json_object": '{"a": [null, 0]}',
    "json_schema": '",:{}[]',
}


class Grammars:
    """The grammars for one tokenizer.

    Args:
        tokenizer: a fast transformers tokenizer.
        vocabulary: the number of the model's logits.
        end_token_ids: what ends an answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, vocabulary: int, end_token_ids: frozenset[int]):
        self.tokenizer = GrammarTokenizer(tokenizer, vocabulary, end_token_ids)

    def bytes_of(self, token: int) -> bytes:
        """The bytes that a token stands for."""
        return self.tokenizer.bytes_of(token)

    def grammar(self, format: str, schema: Json = None, *, thinking: str = "none") -> Grammar:
        """A grammar by its name.

        Args:
            format: ``json_object``, ``json_schema`` or ``action``.
            schema: the schema for ``json_schema``.
            thinking: ``none``; ``may`` (a ``<think>…</think>`` may come first) or ``open`` (the prompt has opened it).

        Raises:
            GrammarError: an unknown format, or a schema that cannot be kept to.
        """
        if format not in FORMATS:
            raise GrammarError(f"unknown format {format!r}; known are {', '.join(FORMATS)}")
        rule = {"json_object": object_rule, "json_schema": lambda: schema_rule(schema)}.get(format)
        grammar = Grammar(self.tokenizer, format, rule() if rule else None, thinking)
        self.tokenizer.check_letters(_NEEDED[format])
        if format == "json_schema":
            for text in literal_texts(schema):
                self.tokenizer.check_text(text)
            for pattern in patterns(schema):
                self.tokenizer.check_pattern(pattern)
        grammar.check()
        return grammar


@dataclass(frozen=True)
class Grammar:
    """One grammar; `start` gives what keeps one answer to it.

    Attributes:
        tokenizer: of the model that answers.
        format: one of `FORMATS`.
        body: the rule for JSON; None for an action, whose rules depend on the room that it has.
        thinking: as `Grammars.grammar` takes it.
    """

    tokenizer: GrammarTokenizer
    format: str
    body: str | None
    thinking: str

    def lark(self, limit: int) -> str:
        """The grammar's text for an answer of at most ``limit`` tokens."""
        mark = self.tokenizer.mark
        spare = (limit - _SKELETON_TOKENS) // 2 // _TOKENS_A_CHARACTER
        longest = {name: max(min(most, spare), 0) for name, most in _LONGEST.items()}
        think = {
            "none": "",
            "may": f"({mark(OPEN)} THOUGHT {mark(CLOSE)})? ",
            "open": f"THOUGHT {mark(CLOSE)} ",
        }[self.thinking]
        body = self.body or action_rules(mark(ANSWER_OPEN), mark(ANSWER_CLOSE), longest["string"])
        lines = [f"start: {think}body", body]
        if think:
            most = longest["thought"] if self.format != "json_schema" else _LONGEST["thought"]
            lines.append(f"THOUGHT: /[^<]{{0,{most}}}/")
        return "\n".join(lines)

    def check(self) -> None:
        """Refuse what llguidance refuses, and what no answer fits.

        Raises:
            GrammarError: with its reason.
        """
        import llguidance

        rules = llguidance.LLMatcher.grammar_from_lark(self.lark(LEAST_TOKENS))
        is_wrong, messages = llguidance.LLMatcher.validate_grammar_with_warnings(rules, self.tokenizer.view)
        if is_wrong:
            raise GrammarError(f"this schema cannot be kept to: {short_reason(messages[0])}")
        # A schema that only refers to itself is valid, but has no first token.
        matcher = llguidance.LLMatcher(self.tokenizer.view, rules, log_level=0)
        matcher.compute_bitmask()
        if matcher.is_stopped():
            raise GrammarError("this schema cannot be kept to: no answer fits it")

    def start(self, limit: int) -> Matcher:
        """What keeps one answer of at most ``limit`` tokens to this grammar.

        Raises:
            GrammarError: too few tokens for an action to end in.
        """
        if self.format == "action" and limit < LEAST_TOKENS:
            raise GrammarError(
                f"an answer under the action grammar needs room for {LEAST_TOKENS} tokens; it has {limit}"
            )
        return Matcher(
            self.tokenizer,
            self.lark(limit),
            thinks=self.thinking == "open",
            closes_within=limit if self.format == "json_object" else None,
        )
