"""Continuous batching: who joins, who leaves, and that nobody's answer depends on the others, to the last bit."""

import itertools

import pytest
import tiny_models
import torch
from test_engine import ask, picture, pocket_conversations
from transformers import MistralConfig, MistralForCausalLM

from labkit.common.errors import LabError
from labkit.engine.batching import Batch, not_finite
from labkit.engine.engine import Engine
from labkit.engine.forward import Forward, Row, find_way
from labkit.models.processors import TemplateProcessor
from labkit.models.spec import ModelSpec
from labkit.plans.quantize import quantize_

SCHEMES = ("fp32", "bf16", "fp16", "int8", "int8-dynamic", "int4", "nf4", "llm-int8")


def hello(text="hello"):
    return [{"role": "user", "content": text}]


@pytest.fixture(scope="module")
def llama():
    return Engine(
        tiny_models.llama(), TemplateProcessor(tiny_models.tokenizer()), spec=ModelSpec("tiny", ".")
    )


@pytest.fixture(scope="module")
def glm4v():
    processor = TemplateProcessor(tiny_models.tokenizer(), tiny_models.image_processor())
    return Engine(tiny_models.glm4v(), processor, spec=ModelSpec("tiny", "."))


@pytest.fixture
def even_clock(monkeypatch):
    """Every prefill and every step takes one second, however fast this machine is at either."""
    clock = itertools.count()
    monkeypatch.setattr("labkit.engine.batching.time.perf_counter", lambda: float(next(clock)))


def quantized_pocket(scheme):
    model, processor = tiny_models.pocket()
    if scheme in ("fp32", "bf16", "fp16"):
        model = model.to({"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[scheme])
    else:
        model = model.to(torch.bfloat16)
        quantize_(model.model.language_model, scheme, progress=False)
    return Engine(model, processor, spec=ModelSpec("tiny", "."))


def alone(engine, messages, **settings):
    """The answer in a batch that has room for eight, and nobody else in it."""
    batch, answer = engine.batch(8), engine.request(messages, **settings)
    batch.add(answer)
    batch.run()
    return answer.result().token_ids


@pytest.mark.parametrize("scheme", SCHEMES)
def test_logits_are_the_same_to_the_last_bit_in_any_company(scheme):
    engine = quantized_pocket(scheme)
    forward = Forward(engine.model)
    prompts = [engine.prepare(messages) for messages in pocket_conversations()]
    lonely = []
    for prompt in prompts:
        row, logits = forward.prefill(prompt)
        seen = [logits]
        for _ in range(6):
            seen.append(forward.step([row], seen[-1].argmax(-1)))
        lonely.append(torch.cat(seen))
    rows, logits = zip(*(forward.prefill(prompt) for prompt in prompts))
    logits = torch.cat(logits)
    for step in range(7):
        assert torch.equal(logits, torch.stack([one[step] for one in lonely])), f"{scheme}, step {step}"
        if step < 6:
            logits = forward.step(rows, logits.argmax(-1))


@pytest.mark.parametrize(("scheme", "ways"), [("bf16", {"together", "padded"}), ("llm-int8", {"single"})])
def test_a_scheme_whose_rows_see_each_other_is_decoded_one_by_one(scheme, ways):
    assert find_way(quantized_pocket(scheme).model) in ways


def test_a_row_depends_on_the_others_where_outliers_are_shared():
    """Why llm-int8 is decoded one by one: another row's outlier changes how this one is multiplied."""
    layer = quantized_pocket("llm-int8").model.model.language_model.layers[0].mlp.down_proj
    row = torch.randn(1, layer.in_features, generator=torch.Generator().manual_seed(1)).bfloat16()
    other = row.clone()
    other[0, :8] = 50
    assert not torch.equal(layer(torch.cat((row, other)))[:1], layer(torch.cat((row, row)))[:1])


def test_sliding_windows_are_decoded_one_by_one_and_rightly():
    config = MistralConfig(**{**tiny_models.llama_config().to_dict(), "sliding_window": 16})
    model = tiny_models.random_model(MistralForCausalLM, config)
    engine = Engine(model, TemplateProcessor(tiny_models.tokenizer()), spec=ModelSpec("tiny", "."))
    assert Forward(model).way == "single"
    conversations = [hello(), hello("a longer beginning than the window has room for"), hello("x")]
    for messages, answer in zip(conversations, engine.generate_batch(conversations, max_new_tokens=24)):
        inputs = engine.prepare(messages)
        expected = model.generate(**inputs, max_new_tokens=24, do_sample=False)
        assert answer.token_ids == expected[0, inputs["input_ids"].shape[1] :].tolist()


def test_answers_join_and_leave_between_steps_and_each_is_the_one_it_gets_alone(glm4v, even_clock):
    texts = [f"question {index} " + "x" * (7 * index % 40) for index in range(12)]
    conversations = [ask(text, picture(56, 28 * (1 + index % 3), index)) for index, text in enumerate(texts)]
    lengths = [3 + 5 * index % 17 for index in range(12)]
    expected = [alone(glm4v, one, max_new_tokens=n) for one, n in zip(conversations, lengths)]
    batch, answers, sizes = glm4v.batch(4), [], []
    for messages, length in zip(conversations, lengths):
        answers.append(glm4v.request(messages, max_new_tokens=length))
        batch.add(answers[-1])
        for _ in range(2):
            batch.step()
            sizes.append(len(batch.active))
    batch.run()
    assert [answer.result().token_ids for answer in answers] == expected
    assert max(sizes) == 4
    assert not batch.active
    assert not batch.waiting


def test_a_new_prompt_joins_while_others_are_being_decoded(llama, even_clock):
    batch = llama.batch(2)
    first, second = (llama.request(hello(text), max_new_tokens=50) for text in ("one", "two"))
    batch.add(first)
    for _ in range(5):
        batch.step()
    batch.add(second)
    while not second.generation.token_ids:
        batch.step()
    assert 5 <= first.generation.completion_tokens < 50
    assert not first.finished


def test_a_stream_of_prompts_never_stops_those_being_decoded(llama, monkeypatch):
    """Prefills that take 100 times a step: decoding still gets its quarter of the time."""
    now, log = [0.0], []
    monkeypatch.setattr("labkit.engine.batching.time.perf_counter", lambda: now[0])
    prefill, step = Forward.prefill, Forward.step

    def slow_prefill(self, inputs):
        now[0] += 1.0
        log.append("prefill")
        return prefill(self, inputs)

    def quick_step(self, rows, tokens, alone=False):
        now[0] += 0.01
        log.append("step")
        return step(self, rows, tokens, alone)

    monkeypatch.setattr(Forward, "prefill", slow_prefill)
    monkeypatch.setattr(Forward, "step", quick_step)
    batch = llama.batch(8)
    batch.add(llama.request(hello("long"), max_new_tokens=200))
    for index in range(5):
        batch.add(llama.request(hello(str(index)), max_new_tokens=2))
    while batch.waiting:
        batch.step()
    between = "".join(one[0] for one in log).split("p")[2:-1]
    assert all(33 <= len(steps) <= 35 for steps in between), between


def test_an_answer_that_is_removed_frees_its_row_and_leaves_the_others_alone(llama):
    expected = alone(llama, hello("one"), max_new_tokens=30)
    batch = llama.batch(2)
    stays, goes, waits = (llama.request(hello(text), max_new_tokens=30) for text in ("one", "two", "three"))
    for answer in (stays, goes, waits):
        batch.add(answer)
    while len(batch.active) < 2:
        batch.step()
    batch.remove(goes)
    batch.remove(goes)
    assert goes.row is None
    while waits.row is None:
        batch.step()
    batch.remove(waits)
    batch.run()
    assert stays.result().token_ids == expected


def test_an_answer_that_cannot_go_on_fails_alone(llama):
    class Nothing:
        done = False

        def allowed(self):
            return torch.zeros(llama.vocabulary, dtype=torch.bool)

        def accept(self, token):
            raise AssertionError("no token was allowed")

    class Grammar:
        def start(self, limit):
            return Nothing()

    batch = llama.batch(4)
    good, bad = llama.request(hello(), max_new_tokens=9), llama.request(hello(), grammar=Grammar())
    for answer in (bad, good):
        batch.add(answer)
    batch.run()
    assert len(good.result().token_ids) == 9
    with pytest.raises(LabError, match="no token is left"):
        bad.result()


def test_a_prompt_that_does_not_fit_the_devices_memory_fails_alone(llama, monkeypatch):
    good, bad = llama.request(hello(), max_new_tokens=5), llama.request(hello("big"), max_new_tokens=5)
    prefill, large = Forward.prefill, bad.inputs["input_ids"]

    def fails(self, inputs):
        if torch.equal(inputs["input_ids"], large):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return prefill(self, inputs)

    monkeypatch.setattr(Forward, "prefill", fails)
    batch = llama.batch(2)
    for answer in (bad, good):
        batch.add(answer)
    batch.run()
    assert len(good.result().token_ids) == 5
    with pytest.raises(LabError, match="not enough memory"):
        bad.result()


def test_the_cache_grows_with_the_answer_and_goes_with_it(llama):
    batch = llama.batch(1)
    batch.add(llama.request(hello(), max_new_tokens=200))
    batch.step()
    small = batch.cache_bytes
    for _ in range(150):
        batch.step()
    heads, width, layers = 2, 32, 2
    assert small == layers * 2 * heads * width * 4 * 128
    assert batch.cache_bytes == 2 * small
    batch.run()
    assert batch.cache_bytes == 0


def test_a_batch_without_rows_is_refused(llama):
    with pytest.raises(ValueError, match="at least one"):
        Batch(Forward(llama.model), llama.device, 0)


def test_rows_know_their_length(llama):
    row, _ = Forward(llama.model).prefill(llama.prepare(hello()))
    assert isinstance(row, Row)
    assert row.length == llama.prepare(hello())["input_ids"].shape[1]


def test_logits_that_are_not_finite_get_advice_that_the_dtype_allows():
    assert "try a plan with bf16 or fp32" in str(not_finite(torch.float16))
    for dtype in (torch.float32, torch.bfloat16):
        assert "its weights are damaged" in str(not_finite(dtype))
        assert "fp32" not in str(not_finite(dtype))
