"""An answer that fails, in whatever stage, ends alone: the seven beside it are what they are without it."""

import json
import random

import pytest
import tiny_models
import torch

from labkit.common.errors import GrammarError, LabError
from labkit.engine.engine import Engine
from labkit.engine.forward import Forward
from labkit.models.spec import ModelSpec

SECRET = "PIN 4711"
WORDS = ["mail", "maps", "<answer>", "</think>", "<|user|>", "<|endoftext|>", "[MASK]", 'a"b\\', "é\n設", ""]


class Panic(BaseException):
    """As a panic of a library in Rust: no `Exception`."""


@pytest.fixture(scope="module")
def pocket():
    model, processor = tiny_models.pocket()
    return Engine(model, processor, spec=ModelSpec("tiny", "."))


@pytest.fixture(scope="module")
def seven(pocket):
    """Seven requests of all kinds, and the tokens of each alone."""
    grammar = pocket.grammars.grammar
    settings = [
        {},
        {"temperature": 1.0, "seed": 1},
        {"temperature": 0.8, "seed": 2, "top_p": 0.9, "top_k": 40},
        {"repetition_penalty": 1.3, "frequency_penalty": 0.5},
        {"logprobs": 3},
        {"temperature": 1.2, "seed": 3, "grammar": grammar("json_object")},
        {"temperature": 1.0, "seed": 4, "stop": ("e", "qu")},
    ]
    requests = [
        (hello(f"question {number}"), {"max_new_tokens": 8, **kinds}) for number, kinds in enumerate(settings)
    ]
    return [(*request, run(pocket, [pocket.request(request[0], **request[1])])[0]) for request in requests]


def hello(text="hello"):
    return [{"role": "user", "content": text}]


def run(engine, answers):
    batch = engine.batch(8)
    for answer in answers:
        batch.add(answer)
    batch.run()
    assert not batch.active
    return [answer.generation.token_ids for answer in answers]


def run_beside(engine, seven, bad):
    """Run the seven with a bad one among them, which is returned; nothing of it is in the others."""
    answers = [engine.request(messages, **settings) for messages, settings, _ in seven]
    tokens = run(engine, [*answers[:3], bad, *answers[3:]])
    del tokens[3]
    assert tokens == [expected for *_, expected in seven]
    assert [answer.error for answer in answers] == [None] * 7
    assert bad.finished
    assert bad.row is None
    return bad


def fail_at(bad, stage, error, monkeypatch):
    """Plant an error in a stage of one answer, after some good tokens where it has several."""

    def fails(*_):
        raise error

    def later(call):
        calls = iter(range(100))
        return lambda *arguments: fails() if next(calls) == 4 else call(*arguments)

    if stage == "prefill":
        prefill, ids = Forward.prefill, bad.inputs["input_ids"]

        def planted(self, inputs):
            return fails() if torch.equal(inputs["input_ids"], ids) else prefill(self, inputs)

        monkeypatch.setattr(Forward, "prefill", planted)
    elif stage == "inputs":
        bad.inputs = type("Broken", (dict,), {"items": fails})(bad.inputs)
    else:
        owner, name = {
            "grammar mask": (bad.sampler.constraint, "allowed"),
            "grammar step": (bad.sampler.constraint, "accept"),
            "penalties": (bad.sampler, "_adjusted"),
            "logprobs": (bad.sampler, "logprobs"),
            "detokenizer": (bad._detokenizer, "push"),
            "stop strings": (bad._stops, "push"),
            "the answer": (bad, "push"),
        }[stage]
        monkeypatch.setattr(owner, name, later(getattr(owner, name)))


STAGES = (
    "inputs", "prefill", "grammar mask", "grammar step", "penalties", "logprobs", "detokenizer", "stop strings",
    "the answer",
)  # fmt: skip


@pytest.mark.parametrize(
    ("stage", "kind"),
    [*((stage, RuntimeError) for stage in STAGES), ("prefill", LabError), ("grammar step", Panic)],
)
def test_an_error_in_any_stage_ends_its_own_row(pocket, seven, stage, kind, monkeypatch):
    grammar = pocket.grammars.grammar("json_object")
    bad = pocket.request(hello(SECRET), grammar=grammar, logprobs=2, stop=("zz",), max_new_tokens=60)
    error = kind(f"{SECRET} in {stage}")
    fail_at(bad, stage, error, monkeypatch)
    run_beside(pocket, seven, bad)
    assert bad.error is error
    with pytest.raises(kind, match=SECRET):
        bad.result()
    assert (bad.generation.completion_tokens > 0) == (stage not in ("inputs", "prefill"))


def test_an_error_in_the_sampler_ends_its_own_row(pocket, seven):
    rng = random.Random(0)
    faults = [
        lambda logits: torch.tensor([1, 2]),
        lambda logits: torch.multinomial(torch.full_like(logits, torch.nan), 1)[0],
        lambda logits: logits[10**9],
        lambda logits: None,
        lambda logits: {}["missing"],
        lambda logits: torch.zeros(3) + torch.zeros(4),
        lambda logits: torch.tensor(10**6),
    ]
    for fault in faults:
        bad = pocket.request(hello(SECRET), temperature=1.0, seed=5, max_new_tokens=60)
        good, calls, when = bad.sampler, iter(range(100)), rng.randrange(4)

        class Processor:
            plain, constraint, settings = False, None, good.settings
            accept, logprobs = good.accept, good.logprobs

            def __call__(self, logits, good=good, calls=calls, when=when, fault=fault):
                return fault(logits) if next(calls) == when else good(logits)

        bad.sampler = Processor()
        run_beside(pocket, seven, bad)
        assert bad.error is not None
        assert bad.generation.completion_tokens == when


def test_random_biases_and_penalties_end_at_most_their_own_row(pocket, seven):
    rng = random.Random(1)
    for _ in range(5):
        bias = {
            rng.randrange(pocket.vocabulary): rng.choice([-100, 100, 0.5]) for _ in range(rng.randrange(300))
        }
        bad = pocket.request(
            hello(SECRET),
            logit_bias=bias,
            temperature=rng.choice([0, 1e-45, 1e-30, 0.7, 100]),
            repetition_penalty=rng.choice([1e-40, 0.1, 1, 1.5, 100]),
            frequency_penalty=rng.choice([-2, 0, 2]),
            top_k=rng.choice([0, 1, 5]),
            top_p=rng.choice([1e-9, 0.5, 1]),
            seed=7,
            max_new_tokens=8,
        )
        run_beside(pocket, seven, bad)


def random_schema(rng, depth=0):
    kind = rng.randrange(7 if depth < 3 else 4)
    word = rng.choice(WORDS) + rng.choice(["", " x", "<"])
    if kind == 0:
        return {"enum": [word, *rng.sample(WORDS, rng.randrange(3))]}
    if kind == 1:
        return {"const": rng.choice([word, {word: word}, [word, 1], None])}
    if kind == 2:
        return {"type": rng.choice(["string", "integer", "boolean"])}
    if kind == 3:
        return {
            "type": "string",
            "pattern": rng.choice(["^[a-c]{1,4}$", "^<answer>[0-9]$", "^(a|b)*</think>$"]),
        }
    if kind == 4:
        return {"type": "array", "items": random_schema(rng, depth + 1), "minItems": 1, "maxItems": 2}
    if kind == 5:
        return {"anyOf": [random_schema(rng, depth + 1) for _ in range(2)]}
    names = rng.sample(WORDS, 2)
    properties = {name: random_schema(rng, depth + 1) for name in names}
    return {"type": "object", "properties": properties, "required": names, "additionalProperties": False}


def test_random_grammars_end_at_most_their_own_row(pocket, seven):
    """Those that can be started are kept to, whatever texts they name; one that no answer fits is not started."""
    with pytest.raises(GrammarError, match="no answer fits it"):
        pocket.grammars.grammar("json_schema", {"anyOf": [{"$ref": "#"}]})
    rng, ended = random.Random(2), 0
    for number in range(9):
        schema = random_schema(rng)
        grammar = pocket.grammars.grammar("json_schema", schema)
        bad = pocket.request(hello(), grammar=grammar, temperature=1.3, seed=number, max_new_tokens=60)
        run_beside(pocket, seven, bad)
        assert bad.error is None, schema
        if bad.generation.finish_reason == "stop":
            json.loads(bad.generation.text)
            ended += 1
    assert ended > 5


def test_an_error_of_the_whole_step_ends_every_row_and_the_batch_goes_on(pocket, seven, monkeypatch):
    answers = [pocket.request(messages, **settings) for messages, settings, _ in seven]
    batch, step = pocket.batch(4, decode_share=0), Forward.step
    for answer in answers:
        batch.add(answer)
    for _ in range(4):
        batch.step()
    monkeypatch.setattr(Forward, "step", lambda *_, **__: 1 // 0)
    broken = list(batch.active)
    with pytest.raises(ZeroDivisionError):
        batch.step()
    assert batch.failures == 1
    assert not batch.active
    assert all(isinstance(answer.error, ZeroDivisionError) and answer.row is None for answer in broken)
    monkeypatch.setattr(Forward, "step", step)
    batch.run()
    assert batch.failures == 0
    for answer, (*_, expected) in zip(answers, seven):
        if answer not in broken:
            assert answer.result().token_ids == expected


def test_ctrl_c_is_for_the_whole_program(pocket, seven, monkeypatch):
    bad = pocket.request(hello(), max_new_tokens=9)
    fail_at(bad, "detokenizer", KeyboardInterrupt(), monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        run(pocket, [bad])
