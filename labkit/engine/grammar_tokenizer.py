"""A model's tokenizer as llguidance sees it: text of a grammar is text, whatever the control tokens are called.

No torch.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from functools import cached_property
from typing import TYPE_CHECKING, Any

from labkit.common.errors import GrammarError

if TYPE_CHECKING:
    from llguidance import LLTokenizer
    from transformers import PreTrainedTokenizerFast

APART = "\0"
"""Before the name of a control token for llguidance: no text of a grammar has it, so none is tokenized as one."""
_SIGNS_OF_PATTERNS = r"\^$.|?*+()[]{}-"


class GrammarTokenizer:
    """What grammars need of a tokenizer.

    Args:
        tokenizer: a fast transformers tokenizer.
        vocabulary: the number of the model's logits.
        end_token_ids: what ends an answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, vocabulary: int, end_token_ids: Iterable[int]):
        self.vocabulary = vocabulary
        self._tokenizer = tokenizer
        self._ends = sorted(end_token_ids)

    @cached_property
    def view(self) -> LLTokenizer:
        """llguidance's view, made when it is first needed.

        Raises:
            GrammarError: a tokenizer that it cannot read.
        """
        from llguidance import LLTokenizer

        if not getattr(self._tokenizer, "is_fast", False):
            raise GrammarError("grammars need a fast tokenizer, which this model lacks")
        backend = copy.copy(self._tokenizer.backend_tokenizer)
        backend.no_padding()
        backend.no_truncation()
        document = _with_control_tokens_apart(json.loads(backend.to_str()))
        keeps_bytes = (document["decoder"] or {}).get("type") == "ByteLevel"
        if keeps_bytes:  # its tokens are bytes: without the normalizer all text is kept as it is
            document["normalizer"] = None
        ends = self._ends or [self._tokenizer.eos_token_id]
        try:
            view = LLTokenizer(json.dumps(document), n_vocab=self.vocabulary, eos_token=ends)
            if keeps_bytes:
                return view
            return LLTokenizer(_Faithful(view, ends[0]), n_vocab=self.vocabulary, eos_token=ends)
        except ValueError as error:
            raise GrammarError(f"grammars cannot read this model's tokenizer: {error}") from None

    def bytes_of(self, token: int) -> bytes:
        """The bytes that a token stands for."""
        return self.view.decode_bytes([token]).replace(APART.encode(), b"", token in self._added)

    def mark(self, text: str) -> str:
        """A tag as a terminal of a grammar: the one token that it is, or its letters."""
        token = self._tokenizer.convert_tokens_to_ids(text)
        is_token = token is not None and token != self._tokenizer.unk_token_id
        return f"<[{token}]>" if is_token and self.view.is_special_token(token) else json.dumps(text)

    def check_text(self, text: str) -> None:
        """Refuse a string of JSON that cannot be written without a control token.

        Raises:
            GrammarError: names the string.
        """
        self._check(text, json.dumps(text, ensure_ascii=False)[1:-1])

    def check_letters(self, letters: Iterable[str]) -> None:
        """Refuse letters that cannot be written without a control token.

        Raises:
            GrammarError: names the first.
        """
        for letter in sorted(set(letters)):
            self._check(letter, letter)

    def check_pattern(self, pattern: str) -> None:
        """Refuse a regular expression with a letter that cannot be written.

        Raises:
            GrammarError: names the letter.
        """
        for letter in sorted(set(pattern) - set(_SIGNS_OF_PATTERNS)):
            self.check_text(letter)

    def _check(self, text: str, written: str) -> None:
        expected = written.encode(errors="surrogatepass")
        if not _is_written(self.view, self.view.tokenize_bytes(expected), expected):
            shown = text if len(text) <= 200 else text[:199] + "…"
            raise GrammarError(f"this model's tokenizer cannot write {shown!r} without a control token")

    @cached_property
    def _added(self) -> frozenset[int]:
        return frozenset(self._tokenizer.added_tokens_decoder)


class _Faithful:
    """Tokenizes for llguidance as a tokenizer does, but byte by byte where that one would write another text.

    Sentencepiece-like tokenizers normalize text (``ﬁ`` becomes ``fi``) and take ``▁`` for a space. The attributes are
    those of `llguidance.TokenizerWrapper`.
    """

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, view: LLTokenizer, end_token: int):
        self._view = view
        self.eos_token_id = end_token
        self.tokens = [view.decode_bytes([token]) for token in range(view.vocab_size)]
        self.special_token_ids = [token for token in range(view.vocab_size) if view.is_special_token(token)]

    def __call__(self, text: bytes | str) -> list[int]:
        expected = text.encode() if isinstance(text, str) else text
        tokens = self._view.tokenize_bytes(expected)
        if _is_written(self._view, tokens, expected):
            return tokens
        return self._view.greedy_tokenize(expected.decode(errors="ignore"))


def _is_written(view: LLTokenizer, tokens: list[int], expected: bytes) -> bool:
    """Whether these tokens are these bytes, without a control token."""
    return view.decode_bytes(tokens) == expected and not any(map(view.is_special_token, tokens))


def _with_control_tokens_apart(document: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer's document in which the names of its added tokens begin with `APART`.

    llguidance tokenizes what a grammar forces. With their own names, a schema's text ``<answer>`` becomes the control
    token, which its parser refuses.
    """
    model, names, kept = document["model"], {}, []
    merged = {first + second for first, second in model.get("merges") or ()}
    for token in document["added_tokens"]:
        if not token["special"] and token["content"] in merged:
            continue  # an ordinary piece, as Gemma's runs of spaces are
        names[token["content"]] = token["content"] = APART + token["content"]
        # A normalizer may take APART away from a name that is normalized.
        token["special"], token["normalized"] = True, False
        kept.append(token)
    document["added_tokens"] = kept
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        vocabulary = {names.get(name, name): number for name, number in vocabulary.items()}
    else:  # Unigram: [name, score]
        vocabulary = [[names.get(name, name), score] for name, score in vocabulary]
    model["vocab"] = vocabulary
    document["post_processor"] = None
    return document
