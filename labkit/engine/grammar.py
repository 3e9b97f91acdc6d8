"""Grammars that an answer cannot leave: the lab's action syntax, JSON, JSON of a schema. No torch at import.

At each token llguidance says which tokens may come next; all others get a logit of minus infinity. An answer
under the action grammar always parses (`labkit.common.actions.parse_answer`): its strings and its thinking are kept
so short that it ends within the tokens it may have. A free JSON object is closed when the room for more runs out.

llguidance (MIT) is the engine of choice: one wheel of 3 MB without dependencies, used by vLLM and llama.cpp;
xgrammar would bring triton, outlines-core knows no context-free grammars.
"""

from __future__ import annotations

import codecs
import copy
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from labkit.common.actions import ACTIONS, POINTS
from labkit.common.errors import GrammarError
from labkit.engine.json_closing import JsonTail

if TYPE_CHECKING:
    from torch import Tensor

FORMATS = ("json_object", "json_schema", "action")
LEAST_TOKENS = 256
"""Tokens that an answer under the action grammar must be allowed."""
MAX_SCHEMA_CHARACTERS = 65_536
_SKELETON_TOKENS = 80  # an action without its strings, and the marks around it, should every byte be a token
_TOKENS_A_CHARACTER = 4  # at most, byte by byte
_CLOSING_ROOM = 12  # tokens: the rest of a character, and what a token may add to the closing
LONGEST_STRING = 200
"""Characters of a string of an action, at most."""
_LONGEST = {"string": LONGEST_STRING, "thought": 600}  # characters
_JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}

APART = "\0"
"""Before the name of a control token for llguidance: no text of a grammar has it, so none is tokenized as one."""


class Grammars:
    """The grammars for one tokenizer.

    Args:
        tokenizer: a fast transformers tokenizer.
        vocabulary: the number of the model's logits.
        end_token_ids: what ends an answer.
    """

    def __init__(self, tokenizer: Any, vocabulary: int, end_token_ids: frozenset[int]):
        self._tokenizer = tokenizer
        self.vocabulary = vocabulary
        self._ends = sorted(end_token_ids)

    @cached_property
    def known(self) -> Any:
        """llguidance's view of the tokenizer, made when it is first needed.

        Raises:
            GrammarError: a tokenizer that it cannot read.
        """
        from llguidance import LLTokenizer

        if not getattr(self._tokenizer, "is_fast", False):
            raise GrammarError("grammars need a fast tokenizer, which this model lacks")
        backend = copy.copy(self._tokenizer.backend_tokenizer)
        backend.no_padding()
        backend.no_truncation()
        ends = self._ends or self._tokenizer.eos_token_id
        try:
            return LLTokenizer(
                _with_control_tokens_apart(backend.to_str()), n_vocab=self.vocabulary, eos_token=ends
            )
        except ValueError as error:
            raise GrammarError(f"grammars cannot read this model's tokenizer: {error}") from None

    def bytes_of(self, token: int) -> bytes:
        """The bytes that a token stands for."""
        return self.known.decode_bytes([token]).replace(APART.encode(), b"", token in self._added)

    @cached_property
    def _added(self) -> frozenset[int]:
        return frozenset(self._tokenizer.added_tokens_decoder)

    def check_text(self, text: str) -> None:
        """Refuse a text of a schema that the tokenizer has no plain tokens for.

        Raises:
            GrammarError: names the text.
        """
        written = json.dumps(text, ensure_ascii=False)
        tokens = self.known.tokenize_str(written)
        if not self._added.isdisjoint(tokens) or self.known.decode_bytes(tokens) != written.encode():
            raise GrammarError(
                f"this model's tokenizer cannot write {_short(text)!r} without a control token"
            )

    def grammar(
        self, format: str, schema: Mapping[str, Any] | None = None, *, thinking: str = "none"
    ) -> Grammar:
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
        if format == "json_schema":
            body = _json_rule(schema)
            for text in _texts(schema):
                self.check_text(text)
        else:
            body = 'body: %json {"type": "object", "x-guidance": ' + json.dumps(_JSON_STYLE) + "}"
        made = Grammar(self, format, None if format == "action" else body, thinking)
        made.check()
        return made

    def mark(self, text: str) -> str:
        """A tag in a grammar: the one token that it is, or its letters."""
        known, token = self.known, self._tokenizer.convert_tokens_to_ids(text)
        there = token is not None and token != self._tokenizer.unk_token_id
        return f"<[{token}]>" if there and known.is_special_token(token) else json.dumps(text)


@dataclass(frozen=True)
class Grammar:
    """One grammar; `start` gives what keeps one answer to it."""

    grammars: Grammars
    format: str
    body: str | None
    thinking: str

    def lark(self, limit: int) -> str:
        """The grammar's text for an answer of at most ``limit`` tokens."""
        mark = self.grammars.mark
        spare = (limit - _SKELETON_TOKENS) // 2 // _TOKENS_A_CHARACTER
        longest = {name: max(min(most, spare), 0) for name, most in _LONGEST.items()}
        think = {
            "none": "",
            "may": f"({mark('<think>')} THOUGHT {mark('</think>')})? ",
            "open": f"THOUGHT {mark('</think>')} ",
        }[self.thinking]
        lines = [f"start: {think}body", self.body or action_rules(mark("<answer>"), longest["string"])]
        if think:
            most = longest["thought"] if self.format != "json_schema" else _LONGEST["thought"]
            lines.append(f"THOUGHT: /[^<]{{0,{most}}}/")
        return "\n".join(lines)

    def check(self) -> None:
        """Refuse what llguidance refuses.

        Raises:
            GrammarError: with its reason.
        """
        import llguidance

        wrong, told = llguidance.LLMatcher.validate_grammar_with_warnings(
            llguidance.LLMatcher.grammar_from_lark(self.lark(LEAST_TOKENS)), self.grammars.known
        )
        if wrong:
            raise GrammarError(f"this schema cannot be kept to: {_short(told[0])}")

    def start(self, limit: int) -> Matcher:
        """What keeps one answer of at most ``limit`` tokens to this grammar.

        Raises:
            GrammarError: too few tokens for an action to end in.
        """
        if self.format == "action" and limit < LEAST_TOKENS:
            raise GrammarError(
                f"an answer under the action grammar needs room for {LEAST_TOKENS} tokens; it has {limit}"
            )
        return Matcher(self, self.lark(limit), limit if self.format == "json_object" else None)


class Matcher:
    """Keeps one answer to a grammar: `labkit.engine.sampling.Constraint`.

    Args:
        grammar, lark: the grammar, and its text.
        closes_within: for a JSON object of any form: it is closed before it has so many tokens.
    """

    def __init__(self, grammar: Grammar, lark: str, closes_within: int | None = None):
        import llguidance
        import llguidance.numpy

        self._matcher = llguidance.LLMatcher(
            grammar.grammars.known, llguidance.LLMatcher.grammar_from_lark(lark)
        )
        self._vocabulary = grammar.grammars.vocabulary
        self._bits = llguidance.numpy.allocate_token_bitmask(1, self._vocabulary)
        self._grammars, self._known, self._left = grammar.grammars, grammar.grammars.known, closes_within
        self._tail, self._decoder = JsonTail(), codecs.getincrementaldecoder("utf-8")("ignore")
        self._thinks = grammar.thinking == "open"
        self._check()

    @property
    def done(self) -> bool:
        """Whether nothing more can come."""
        return self._matcher.is_stopped()

    def allowed(self) -> Tensor:
        """Which tokens may come next: bool ``[vocabulary]``.

        Raises:
            GrammarError: the grammar became too complex to follow.
        """
        import llguidance.numpy
        import numpy as np
        import torch

        llguidance.numpy.fill_next_token_bitmask(self._matcher, self._bits)
        self._check()
        bits = np.unpackbits(self._bits.view(np.uint8)[0], bitorder="little")[: self._vocabulary]
        allowed = torch.from_numpy(bits.astype(bool))
        closing = self._closing_token()
        if closing is not None and allowed[closing]:
            allowed = torch.zeros_like(allowed)
            allowed[closing] = True
        return allowed

    def _closing_token(self) -> int | None:
        """The token that the object must be closed with, if it is time."""
        if self._left is None or not self._tail.begun:
            return None
        tokens = self._known.tokenize_str(self._tail.closing)
        return tokens[0] if len(tokens) + _CLOSING_ROOM >= self._left else None

    def accept(self, token: int) -> None:
        """Take the token that came.

        Raises:
            GrammarError: it was not allowed, or the grammar became too complex to follow.
        """
        self._matcher.consume_token(token)
        self._check()
        if self._left is not None:
            self._left -= 1
            self._follow(self._grammars.bytes_of(token))

    def _follow(self, piece: bytes) -> None:
        """Read what belongs to the object: not the thinking before it."""
        text = self._decoder.decode(piece)
        if not self._tail.begun and "<think>" in text:
            self._thinks = True
        elif self._thinks:
            self._thinks = "</think>" not in text
        else:
            self._tail.push(text)

    def _check(self) -> None:
        if self._matcher.is_error():
            raise GrammarError(f"the grammar cannot be followed: {_short(self._matcher.get_error())}")


def action_rules(answer: str, string_characters: int) -> str:
    """The rules of AutoGLM's action syntax, as `labkit.common.actions` writes it; `answer` is the tag that opens it."""
    calls, arguments = [], set()
    for name, (required, optional) in ACTIONS.items():
        parts = [] if name == "finish" else [json.dumps(f'action="{name}"')]
        for index, argument in enumerate(required + optional):
            comma = "" if name == "finish" and index == 0 else ", "
            arguments.add(argument)
            part = f"{json.dumps(f'{comma}{argument}=')} {'point' if argument in POINTS else 'string'}"
            parts.append(f"({part})?" if argument in optional else part)
        opening = json.dumps("finish(" if name == "finish" else "do(")
        calls.append(f'{opening} {" ".join(parts)} ")"')
    return "\n".join(
        [
            f"body: {answer} call",
            f"call: {' | '.join(calls)}",
            'point: "[" NUMBER "," NUMBER "]"',
            "NUMBER: /0|[1-9][0-9]{0,2}/",
            'string: "\\"" TEXT "\\""',
            rf'TEXT: /([^"\\\x00-\x1f\x7f]|\\["\\nt]){{0,{string_characters}}}/',
        ]
    )


def _json_rule(schema: Any) -> str:
    if not isinstance(schema, Mapping):
        raise GrammarError("json_schema needs a schema: a JSON object")
    text = json.dumps({**schema, "x-guidance": {**_JSON_STYLE, **schema.get("x-guidance", {})}})
    if len(text) > MAX_SCHEMA_CHARACTERS:
        raise GrammarError(
            f"the schema has {len(text):,} characters; at most {MAX_SCHEMA_CHARACTERS:,} are accepted"
        )
    return f"body: %json {text}"


def _with_control_tokens_apart(tokenizer: str) -> str:
    """A tokenizer's JSON in which the names of its added tokens begin with `APART`.

    llguidance tokenizes what a grammar forces. With their own names, a schema's text ``<answer>`` becomes the control
    token, which its parser refuses.
    """
    document = json.loads(tokenizer)
    names = {}
    for token in document["added_tokens"]:
        names[token["content"]] = token["content"] = APART + token["content"]
        token["special"] = True
    vocabulary = document["model"]["vocab"]
    if isinstance(vocabulary, dict):
        vocabulary = {names.get(name, name): number for name, number in vocabulary.items()}
    else:  # Unigram: [name, score]
        vocabulary = [[names.get(name, name), score] for name, score in vocabulary]
    document["model"]["vocab"] = vocabulary
    document["post_processor"] = None
    return json.dumps(document)


def _texts(schema: Any) -> Iterator[str]:
    """What an answer under a schema may have to write literally: its constants and the names of properties."""
    if isinstance(schema, list):
        for part in schema:
            yield from _texts(part)
    elif isinstance(schema, Mapping):
        for key, value in schema.items():
            if key in ("const", "enum", "required"):
                yield from _strings(value)
            elif key == "properties" and isinstance(value, Mapping):
                yield from value
                yield from _texts(list(value.values()))
            else:
                yield from _texts(value)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for part in value:
            yield from _strings(part)
    elif isinstance(value, Mapping):
        yield from _strings([*value, *value.values()])


def _short(text: str) -> str:
    line = " ".join(str(text).partition("\n1 | ")[0].split())  # without the grammar itself
    return line if len(line) <= 200 else line[:199] + "…"
