"""Answers that are kept to a grammar: a model that knows nothing still answers in the right form."""

import json

import pytest
import tiny_models
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from labkit.common.actions import ACTIONS, Action, format_action, parse_answer
from labkit.common.errors import GrammarError
from labkit.engine.action_grammar import action_rules
from labkit.engine.engine import Engine
from labkit.engine.grammar import LEAST_TOKENS, Grammars
from labkit.engine.json_closing import JsonTail
from labkit.models.processors import TemplateProcessor
from labkit.models.spec import ModelSpec

HELLO = [{"role": "user", "content": "hi"}]
SCHEMA = {
    "type": "object",
    "properties": {"app": {"enum": ["mail", "maps"]}, "x": {"type": "integer", "minimum": 0, "maximum": 999}},
    "required": ["app", "x"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def pocket():
    model, processor = tiny_models.pocket()
    return Engine(model, processor, spec=ModelSpec("tiny", "."))


@pytest.fixture(scope="module")
def llama():
    config = tiny_models.llama_config()
    config.max_position_embeddings = 1024
    model = tiny_models.random_model(LlamaForCausalLM, config)
    return Engine(model, TemplateProcessor(tiny_models.tokenizer()), spec=ModelSpec("tiny", "."))


@pytest.mark.parametrize("thinking", ["none", "may", "open"])
def test_a_random_models_answer_always_parses(pocket, thinking):
    grammar = pocket.grammars.grammar("action", thinking=thinking)
    names, thoughts = set(), 0
    for seed in range(40):
        options = {"temperature": 1.4, "seed": seed, "max_new_tokens": 300}
        answer = pocket.generate(HELLO, grammar=grammar, **options)
        whole = ("<think>" if thinking == "open" else "") + answer.text
        parsed = parse_answer(whole)
        assert parsed.action is not None, f"seed {seed}: {whole!r}"
        assert answer.finish_reason == "stop"
        assert parse_answer(format_action(parsed.action)).action == parsed.action
        names.add(parsed.action.name)
        thoughts += parsed.thinking is not None
    assert len(names) > 6
    assert {"none": thoughts == 0, "may": 0 < thoughts < 40, "open": thoughts == 40}[thinking]


def test_json_that_was_cut_anywhere_is_closed():
    samples = [
        {"a": [1, -2.5e10, True, None, 'x\u00e9\n"', []], "": {}, "b": {"c": [[{"d": False}]]}},
        {"zwölf": "\U0001f600 \\ /", "n": [0, -1, 1e-7, 3.25], "o": {"p": {"q": "r, s: t"}}},
    ]
    for text in [json.dumps(one, ensure_ascii=ascii) for one in samples for ascii in (True, False)]:
        for cut in range(1, len(text) + 1):
            tail = JsonTail()
            tail.push(text[:cut])
            assert isinstance(json.loads(text[:cut] + tail.closing), dict), (text[:cut], tail.closing)
        assert (tail.begun, tail.closing) == (False, "")


@pytest.mark.parametrize("thinking", ["none", "may", "open"])
@pytest.mark.parametrize("tokens", [48, 300])
def test_a_free_object_is_closed_while_there_is_room(pocket, thinking, tokens):
    grammar = pocket.grammars.grammar("json_object", thinking=thinking)
    for seed in range(6):
        answer = pocket.generate(HELLO, grammar=grammar, temperature=1.4, seed=seed, max_new_tokens=tokens)
        assert answer.finish_reason == "stop"
        assert isinstance(json.loads(answer.text.rpartition("</think>")[2]), dict)


def test_the_shortest_answer_allowed_still_ends(pocket):
    grammar = pocket.grammars.grammar("action", thinking="may")
    for seed in range(10):
        answer = pocket.generate(
            HELLO, grammar=grammar, temperature=2.0, seed=seed, max_new_tokens=LEAST_TOKENS
        )
        assert parse_answer(answer.text).action is not None
    with pytest.raises(GrammarError, match=f"room for {LEAST_TOKENS} tokens; it has 100"):
        pocket.generate(HELLO, grammar=grammar, max_new_tokens=100)


@pytest.mark.parametrize(
    "action",
    [
        Action("Tap", {"element": (0, 999)}),
        Action("Tap", {"element": (7, 70), "message": 'a "b" \\ c'}),
        Action("Swipe", {"start": (500, 700), "end": (500, 300)}),
        Action("Type", {"text": "打开 settings\nnow"}),
        Action("Wait", {"duration": "2 seconds"}),
        Action("Take_over", {}),
        Action("finish", {"message": "done"}),
        *(Action(name) for name, (required, _) in ACTIONS.items() if not required),
    ],
)
def test_what_the_lab_writes_is_in_the_grammar(pocket, action):
    matcher = pocket.grammars.grammar("action").start(LEAST_TOKENS)
    for token in pocket.tokenizer.encode(
        f"<answer>{format_action(action)}</answer>", add_special_tokens=False
    ):
        assert matcher.allowed()[token], pocket.tokenizer.decode([token])
        matcher.accept(token)
    assert matcher.done


@pytest.mark.parametrize(
    "text", ['do(action="Tap", element=[1000,5])', 'do(action="Tap", element=[05,5])', "do(x"]
)
def test_what_does_not_parse_is_not_in_the_grammar(pocket, text):
    matcher = pocket.grammars.grammar("action").start(LEAST_TOKENS)
    tokens = pocket.tokenizer.encode(f"<answer>{text}", add_special_tokens=False)
    with pytest.raises(GrammarError, match="cannot be followed"):
        any(matcher.accept(token) for token in tokens)


def test_a_schema_is_kept_to(pocket, llama):
    for engine in (pocket, llama):
        grammar = engine.grammars.grammar("json_schema", SCHEMA)
        for seed in range(8):
            options = {"temperature": 1.5, "seed": seed, "max_new_tokens": 120}
            made = json.loads(engine.generate(HELLO, grammar=grammar, **options).text)
            assert made.keys() == {"app", "x"}
            assert made["app"] in ("mail", "maps")
            assert 0 <= made["x"] <= 999


def test_json_that_is_cut_off_is_a_beginning_of_an_object(pocket):
    grammar = pocket.grammars.grammar("json_object")
    ended = 0
    for seed in range(8):
        answer = pocket.generate(HELLO, grammar=grammar, temperature=1.5, seed=seed, max_new_tokens=150)
        assert answer.text.startswith("{")
        if answer.finish_reason == "stop":
            assert isinstance(json.loads(answer.text), dict)
            ended += 1
    assert ended


@pytest.mark.parametrize(
    ("schema", "told"),
    [
        ({"type": "nonsense"}, "Invalid type: nonsense"),
        ({"$ref": "#/nowhere"}, "does not exist"),
        ({"type": "string", "pattern": "("}, "unclosed group"),
        ([], "needs a schema"),
        ({"description": "x" * 70_000}, "at most 65,536"),
    ],
)
def test_a_schema_that_cannot_be_kept_to_is_refused_before_anything_is_computed(pocket, schema, told):
    with pytest.raises(GrammarError, match=told) as refused:
        pocket.grammars.grammar("json_schema", schema)
    assert "\n" not in str(refused.value)


def test_an_unknown_format_is_refused(pocket):
    with pytest.raises(GrammarError, match="known are json_object, json_schema, action"):
        pocket.grammars.grammar("yaml")


def test_tokens_are_the_bytes_that_they_stand_for(pocket):
    text = "设<think>a"
    ids = pocket.tokenizer.encode(text, add_special_tokens=False)
    assert b"".join(pocket.grammars.bytes_of(token) for token in ids) == text.encode()


def test_a_model_without_marks_writes_them_as_letters(llama):
    assert '"<answer>"' in llama.grammars.grammar("action").lark(LEAST_TOKENS)
    answer = llama.generate(
        HELLO, grammar=llama.grammars.grammar("action"), temperature=1, seed=1, max_new_tokens=256
    )
    assert parse_answer(answer.text).action is not None


def test_every_action_of_the_protocol_is_in_the_rules():
    rules = action_rules('"<answer>"', '"</answer>"', 10)
    assert all(f'action=\\"{name}\\"' in rules for name in ACTIONS if name != "finish")


def test_a_slow_tokenizer_is_refused_with_the_reason():
    with pytest.raises(GrammarError, match="fast tokenizer"):
        Grammars(object(), 10, frozenset({0})).grammar("json_object")


MARKED = ["PIN 4711 <answer>", "<|user|>", "<|endoftext|>", "</think>", "a<|image|>b", "[MASK]", "日<think>"]


@pytest.mark.parametrize("text", MARKED)
def test_the_text_of_a_schema_is_text_whatever_tokens_are_called(pocket, text):
    schemas = [
        ({"enum": [text]}, text),
        ({"const": [{text: text}]}, [{text: text}]),
        (
            {
                "type": "object",
                "properties": {text: {"const": 7}},
                "required": [text],
                "additionalProperties": False,
            },
            {text: 7},
        ),
    ]
    for schema, expected in schemas:
        grammar = pocket.grammars.grammar("json_schema", schema)
        answer = pocket.generate(HELLO, grammar=grammar, temperature=1.5, seed=1, max_new_tokens=200)
        assert json.loads(answer.text) == expected
        assert answer.finish_reason == "stop"
        assert not set(answer.token_ids[:-1]) & set(pocket.tokenizer.added_tokens_decoder)


def test_what_cannot_be_written_without_a_control_token_is_refused_by_name():
    letters = {letter: number for number, letter in enumerate('abc"{}[]:,Ġ')}
    plain = Tokenizer(models.BPE(vocab=letters, merges=[]))
    plain.pre_tokenizer, plain.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    plain.add_special_tokens(["<x>", "<end>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<end>")
    grammars = Grammars(tokenizer, len(tokenizer), frozenset({tokenizer.eos_token_id}))
    grammars.grammar("json_schema", {"enum": ["abc"]})
    for schema in (
        {"enum": ["abc", "a<x>"]},
        {"const": {"a<x>": 1}},
        {"type": "object", "properties": {"a<x>": {"type": "null"}}},
        {"anyOf": [{"type": "null"}, {"type": "object", "required": ["a<x>"]}]},
    ):
        with pytest.raises(GrammarError, match="cannot write 'a<x>' without a control token"):
            grammars.grammar("json_schema", schema)
