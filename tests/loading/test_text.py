"""Sequences of text begin with the tokens that the tokenizer puts before every text."""

import pytest
import tiny_models
from tokenizers.processors import TemplateProcessing

from labkit.common.errors import LabError
from labkit.loading.quantize_to import text_batches
from labkit.loading.text import describe_start, leading_ids, text_sequences


def tokenizer(single):
    words = tiny_models.tokenizer()
    names = ["<|user|>", "<|endoftext|>"]
    ids = words.convert_tokens_to_ids(names)
    words._tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=[*zip(names, ids)])
    return words


@pytest.mark.parametrize(
    ("single", "first"),
    [
        ("$A", []),
        ("$A <|endoftext|>", []),
        ("<|user|> $A", ["<|user|>"]),
        ("<|user|> <|user|> $A <|endoftext|>", ["<|user|>", "<|user|>"]),
    ],
)
def test_leading_tokens_are_those_before_a_text(single, first):
    words = tokenizer(single)
    assert words.convert_ids_to_tokens(leading_ids(words)) == first
    assert describe_start(words) == " ".join(first)
    sequences = text_sequences(words, "abcdefgh" * 5, 8, "the text")
    step = 8 - len(first)
    assert sequences.shape == (40 // step, 8)
    assert words.decode(sequences[:, len(first) :].flatten()) == ("abcdefgh" * 5)[: 40 // step * step]


def test_text_that_quantize_calibrates_on_begins_alike(tmp_path):
    words = tokenizer("<|user|> $A")
    (path := tmp_path / "t.txt").write_text("abcdefg" * 9)
    batches = text_batches(words, path, 5, length=8)
    assert [batch["input_ids"].shape for batch in batches] == [(1, 8)] * 5
    assert {int(batch["input_ids"][0, 0]) for batch in batches} == set(leading_ids(words))
    with pytest.raises(LabError, match=r"t\.txt has 63 tokens, fewer than one sequence of 99"):
        text_batches(words, path, 5, length=99)
