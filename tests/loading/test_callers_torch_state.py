"""A caller's torch state changes no answer of the lab and is the same afterwards."""

from contextlib import contextmanager

import pytest
import tiny_models
import torch
from checkpoint_models import HELLO

import labkit
from labkit.common.errors import LabError
from labkit.engine import forward as forward_module
from labkit.engine.forward import Forward
from labkit.plans.fill import fill_
from labkit.quantization import QuantizedLinear


@contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
        assert torch.get_default_dtype() == dtype
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
        assert torch.get_default_device().type == device
    finally:
        torch.set_default_device(None)


@contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


STATES = {
    "float16": lambda: default_dtype(torch.float16),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float64": lambda: default_dtype(torch.float64),
    "meta": lambda: default_device("meta"),
    "device context": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    "deterministic": deterministic,
}
every_state = pytest.mark.parametrize("state", STATES.values(), ids=STATES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    tiny_models.llama().save_pretrained(folder)
    tiny_models.tokenizer().save_pretrained(folder)
    return folder


def load(folder, plan):
    engine = labkit.load(folder, plan, "cpu", progress=False)
    engine.end_token_ids = frozenset()
    return engine


def tokens(engine):
    return engine.generate(HELLO, max_new_tokens=10).token_ids


def logits(engine):
    """After the prompt, and after one token more: [2, vocabulary]."""
    row, first = engine.forward.prefill(engine.prepare(HELLO))
    return torch.cat((first, engine.forward.step([row], first.argmax(-1), alone=True)))


PLANS = ["fp32", "int8", "nf4"]  # two by the compiled step, one by the modules


@pytest.fixture(scope="module", params=PLANS)
def engine(request, folder):
    engine = load(folder, request.param)
    engine.right, engine.logits = tokens(engine), logits(engine)
    return engine


@every_state
def test_a_loaded_model_answers_alike(engine, state):
    with state():
        assert tokens(engine) == engine.right
        assert [answer.token_ids for answer in engine.generate_batch([HELLO] * 2, max_new_tokens=10)] == [
            engine.right
        ] * 2
        answer = engine.stream(HELLO, max_new_tokens=10)
        list(answer)
        now = logits(engine)
    assert torch.equal(now, engine.logits)
    assert answer.generation.token_ids == engine.right


@every_state
def test_a_model_loaded_there_answers_alike_there_and_elsewhere(folder, engine, state):
    random = torch.random.get_rng_state()
    with state():
        other = load(folder, engine.plan.name)
        assert tokens(other) == engine.right
        there = logits(other)
    assert torch.equal(there, engine.logits)
    assert torch.equal(logits(other), engine.logits)
    assert torch.equal(torch.random.get_rng_state(), random)  # the caller's default generator is the caller's
    assert not any(tensor.is_inference() for tensor in other.model.parameters())


@every_state
def test_a_model_quantized_there_is_the_same(state):
    weights = []
    for context in (state, torch.no_grad):
        model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 32))
        with torch.no_grad():
            for number, parameter in enumerate(model.parameters()):
                parameter.copy_(
                    torch.linspace(-1, 1, parameter.numel()).sin().view_as(parameter) * (number + 1)
                )
        batches = [torch.linspace(-1, 1, 640).view(10, 64)]
        plan = labkit.QuantizationPlan.uniform("gptq", group_size=32)
        with context():
            labkit.quantize_(model, plan, batches, progress=False)
        weights.append([module.dequantize() for module in model if isinstance(module, QuantizedLinear)])
    assert len(weights[0]) == 2
    assert all(map(torch.equal, *weights))


def test_a_load_that_fails_half_way_leaves_the_state_as_it_was(folder, monkeypatch):
    def fails(*given, **options):
        fill_(*given, **options)
        torch.set_default_dtype(torch.float16)
        raise LabError("half-way")

    monkeypatch.setattr("labkit.loading.load.fill_", fails)
    before = torch.get_num_threads(), torch.is_grad_enabled(), torch.random.get_rng_state()
    for dtype in (torch.float32, torch.float64):
        with default_dtype(dtype), pytest.raises(LabError, match="half-way"):
            load(folder, "int8")
    assert before[:2] == (torch.get_num_threads(), torch.is_grad_enabled())
    assert torch.equal(before[2], torch.random.get_rng_state())


def test_rows_are_tried_anew_for_another_number_of_threads(monkeypatch):
    """A product's rounding may depend on the number of threads: what holds with one need not hold with two."""
    counts = []
    monkeypatch.setattr(
        forward_module, "find_way", lambda model: counts.append(torch.get_num_threads()) or "padded"
    )
    forward, threads = Forward(tiny_models.llama()), torch.get_num_threads()
    try:
        for count in (1, 2, 1):
            torch.set_num_threads(count)
            assert forward.way == "padded"
    finally:
        torch.set_num_threads(threads)
    assert counts == [1, 2]
