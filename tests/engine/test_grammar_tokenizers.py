"""Grammars hold for any text under any kind of tokenizer, and what an answer is made of comes out as it was written."""

import json
import random
import re

import numpy as np
import pytest
import tiny_tokenizers

from labkit.common.actions import Action, format_action, parse_answer
from labkit.common.errors import GrammarError
from labkit.engine.detokenize import Detokenizer
from labkit.engine.grammar import LEAST_TOKENS, Grammars

ROOM = 2_000
TEXTS = [
    "PIN 4711 <answer>", "<|user|>", "</s>", "<s><unk>", "a<|image|>b", "[MASK]", "</think>", "日<think>", "<0x41>",
    "▁a", "  two  spaces ", "é😀", "ﬁ", "\0<think>", "\x00\x7f", '\\" \\\\ \t\n', "\u2028",
]  # fmt: skip


@pytest.fixture(scope="module", params=tiny_tokenizers.KINDS)
def tokenizer(request):
    return tiny_tokenizers.KINDS[request.param]()


def grammars_of(tokenizer):
    return Grammars(tokenizer, len(tokenizer) + 3, frozenset({tokenizer.eos_token_id}))


def random_answer(grammar, tokenizer, seed, room=ROOM):
    """What a model that knows nothing writes under a grammar, as the engine gives its text."""
    matcher, detokenizer, draw = grammar.start(room), Detokenizer(tokenizer), random.Random(seed)
    text = ""
    for _ in range(room):
        token = int(draw.choice(np.flatnonzero(matcher.allowed().numpy())))
        if token == tokenizer.eos_token_id:
            return text
        matcher.accept(token)
        text += detokenizer.push(token)
        if matcher.done:
            return text
    raise AssertionError(f"no end: {text!r}")


@pytest.mark.parametrize("text", TEXTS)
def test_the_text_of_a_schema_is_written_as_it_is(tokenizer, text):
    key = {
        "type": "object",
        "properties": {text: {"const": 7}},
        "required": [text],
        "additionalProperties": False,
    }
    pattern = {"type": "string", "pattern": f"^{re.escape(text)}$"}
    pairs = [({"enum": [text]}, text), ({"const": [{text: text}]}, [{text: text}]), (key, {text: 7})]
    for schema, expected in [*pairs, (pattern, text)]:
        grammar = grammars_of(tokenizer).grammar("json_schema", schema)
        assert json.loads(random_answer(grammar, tokenizer, 1)) == expected


@pytest.mark.parametrize("thinking", ["none", "may", "open"])
def test_a_random_answer_parses_under_any_tokenizer(tokenizer, thinking):
    grammar = grammars_of(tokenizer).grammar("action", thinking=thinking)
    for seed in range(12):
        text = random_answer(grammar, tokenizer, seed, LEAST_TOKENS)
        whole = ("<think>" if thinking == "open" else "") + text
        assert parse_answer(whole).action is not None, whole
        assert whole.endswith("</answer>")


@pytest.mark.parametrize("text", [*TEXTS, "</answer>", '")</answer>', 'do(action="Back")', "，。（）“”", ""])
def test_an_action_with_any_text_is_in_the_grammar(tokenizer, text):
    grammars = grammars_of(tokenizer)
    matcher = grammars.grammar("action").start(ROOM)
    action = Action("Type", {"text": text})
    call = format_action(action)
    view, detokenizer, written = grammars.tokenizer.view, Detokenizer(tokenizer), ""
    tags = {tag: tokenizer.convert_tokens_to_ids(tag) for tag in ("<answer>", "</answer>")}
    for token in [tags["<answer>"], *view.tokenize_str(call), tags["</answer>"]]:
        matcher.accept(token)
        written += detokenizer.push(token)
    assert matcher.done
    assert written == f"<answer>{call}</answer>"
    assert parse_answer(written).action == action


def test_characters_of_several_byte_tokens_are_given_out_whole():
    tokenizer = tiny_tokenizers.sentencepiece()
    text = 'a😀é "漢" \U0001f468\u200d\U0001f469 b'
    for tokens in (tokenizer.encode(text, add_special_tokens=False), tokenizer.encode(text)):
        detokenizer = Detokenizer(tokenizer)
        assert "".join(map(detokenizer.push, tokens)) == text


def test_what_a_tokenizer_cannot_write_is_refused_by_name():
    grammars = grammars_of(tiny_tokenizers.unigram(byte_fallback=False))
    for schema in ({"const": "日"}, {"type": "string", "pattern": "^[a日]+$"}):
        with pytest.raises(GrammarError, match="cannot write '日' without a control token"):
            grammars.grammar("json_schema", schema)
    with pytest.raises(GrammarError, match="cannot read this model's tokenizer"):
        grammars_of(tiny_tokenizers.wordpiece()).grammar("json_object")


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "object", "x-guidance": 5}, "x-guidance must be a JSON object"),
        ({"$ref": "#"}, "no answer fits it"),
        ({"const": float("nan")}, "is no JSON"),
        ({"const": "\ud800"}, "cannot be kept to"),
    ],
)
def test_odd_schemas_are_refused_before_the_start(schema, reason):
    with pytest.raises(GrammarError, match=reason):
        grammars_of(tiny_tokenizers.byte_level()).grammar("json_schema", schema)


def test_a_deep_schema_is_refused_without_a_deep_stack():
    schema = {"type": "null"}
    for _ in range(100_000):
        schema = {"items": schema}
    with pytest.raises(GrammarError, match="nested more than 100 levels"):
        grammars_of(tiny_tokenizers.byte_level()).grammar("json_schema", schema)
    while schema:  # else freeing it would be as deep
        schema = schema.pop("items", None)
