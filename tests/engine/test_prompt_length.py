"""A prompt far over the context is refused in the time and memory of that context."""

import pytest
import tiny_models

from labkit.common.errors import PromptTooLongError
from labkit.engine.engine import Engine
from labkit.engine.prompt_length import PIECE, check_length, longest_token
from labkit.models.processors import TemplateProcessor
from labkit.models.spec import ModelSpec


class Words:
    """A tokenizer with a token for each word."""

    def __init__(self, longest=20):
        self.longest, self.encoded = longest, 0

    def get_vocab(self):
        return {"x" * self.longest: 0, "a": 1}

    def encode(self, text, *, add_special_tokens):
        self.encoded += len(text)
        return text.split()


def check(text, tokenizer, length):
    check_length([{"role": "user", "content": text}], tokenizer, longest_token(tokenizer), length, "tiny")


def test_more_characters_than_the_context_can_hold_are_not_tokenized():
    tokenizer = Words()
    with pytest.raises(
        PromptTooLongError, match="2,001 characters; the 100 tokens of tiny hold 2,000 at most"
    ):
        check("a" * 2001, tokenizer, 100)
    assert tokenizer.encoded == 0


def test_a_text_of_too_many_tokens_is_tokenized_only_in_part():
    tokenizer = Words(1000)
    with pytest.raises(PromptTooLongError, match="tokens; tiny takes 9999"):
        check("a " * 4_000_000, tokenizer, 10_000)
    assert tokenizer.encoded <= 2 * PIECE


def test_what_may_fit_is_let_through():
    check("a " * 10_000, Words(), 10_000)
    check("a " * 60_000, Words(), 40_000)  # the exact count is the processor's
    check("a" * 10**6, Words(), None)


def test_parts_of_all_messages_count():
    tokenizer = Words()
    parts = [{"type": "text", "text": "a" * 900}, {"type": "image", "image": None}]
    with pytest.raises(PromptTooLongError):
        check_length([{"role": "user", "content": parts}] * 3, tokenizer, 20, 100, "tiny")


def test_the_engine_refuses_before_its_processor_is_asked(monkeypatch):
    engine = Engine(
        tiny_models.llama(), TemplateProcessor(tiny_models.tokenizer()), spec=ModelSpec("tiny", ".")
    )
    monkeypatch.setattr(TemplateProcessor, "__call__", lambda *_, **__: pytest.fail("tokenized"))
    with pytest.raises(PromptTooLongError, match="characters"):
        engine.generate([{"role": "user", "content": "hello " * 100_000}])
