"""The static decoding step against transformers' own modules: in plain torch, and by kernels where they run."""

import gc
import weakref

import pytest
import tiny_models
import torch

import labkit
from labkit import quantize_
from labkit.engine.forward import Forward, find_step, modules_only
from labkit.engine.kv_cache import PLAIN
from labkit.engine.step_gpu import captured
from labkit.engine.step_gpu import step as static_step
from labkit.engine.step_gpu.captured import CapturedStep, captured_step, why_not
from labkit.engine.step_gpu.decoder import UnknownDecoderError, decoder_of
from labkit.measure.cost import standard_conversations
from labkit.plans.plan import QuantizationPlan
from labkit.quantization import QuantizedLinear
from labkit.quantization.kernels.cuda_products import available

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PLANS = ["fp32", "bf16", "fp16", "int8", "int4", "int3", "int8-dynamic", "hqq"]
PROMPTS = [[5, 99, 17, 230, 41], [7] * 300, [250, 1, 2]]
kernels = pytest.mark.skipif(not available(DEVICE), reason="needs triton, and a GPU or TRITON_INTERPRET=1")


def by_modules(model, keeping=PLAIN) -> Forward:
    """What is compared with: the model's own modules."""
    return Forward(model, keeping, modules_only)


def by_step(model, keeping=PLAIN, plain=False) -> Forward:
    """The captured step, or its operations in plain torch."""
    return Forward(model, keeping, lambda model, keeping: (CapturedStep(model, keeping, plain), ""))


def model_under(plan: str, for_kernels: bool = False):
    model = tiny_models.glm4v()
    roles = {name: "decoder" for name, _ in model.named_modules()}
    quantize_(model, QuantizationPlan.from_yaml(plan), roles=roles, progress=False)
    model.to(DEVICE)
    for module in model.modules() if for_kernels else ():
        if isinstance(module, QuantizedLinear):
            module._set_layout("plain")  # what it is on a GPU
    return model


def answer(forward: Forward, prompt: list[int], count: int = 12) -> tuple[list[int], torch.Tensor]:
    """Greedy tokens of one prompt, and the logits of each."""
    row, logits = forward.prefill({"input_ids": torch.tensor([prompt], device=DEVICE)})
    tokens, seen = [], []
    for _ in range(count):
        seen.append(logits.float().clone())
        tokens.append(int(logits.argmax(-1)))
        logits = forward.step([row], logits.argmax(-1), alone=True)
    return tokens, torch.cat(seen)


def along(forward: Forward, prompt: list[int], tokens: list[int]):
    """The row, and the logits when these are the tokens of the answer, whatever would be chosen."""
    row, logits = forward.prefill({"input_ids": torch.tensor([prompt], device=DEVICE)})
    seen = [logits.clone()]
    for token in tokens[:-1]:
        seen.append(forward.step([row], torch.tensor([token], device=DEVICE), alone=True).clone())
    return row, torch.cat(seen)


@pytest.mark.parametrize("plan", PLANS)
def test_plain_operations_are_those_of_the_modules(plan):
    model = model_under(plan)
    for prompt in PROMPTS:
        want, exact = answer(by_modules(model), prompt)
        got, logits = answer(by_step(model, plain=True), prompt)
        assert got == want
        assert torch.allclose(logits, exact, rtol=0, atol=0.02 * exact.abs().max())


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["fp32", "bf16", "int8", "int8-dynamic", "int4", "nf4"])
def test_the_pocket_model_answers_alike(plan):
    engine = labkit.load("pocket", plan, device="cpu", progress=False)
    conversations = standard_conversations(engine, None, 4)
    want = [engine.generate(one, max_new_tokens=24).token_ids for one in conversations]
    engine._forward = by_step(engine.model, plain=True)
    assert [engine.generate(one, max_new_tokens=24).token_ids for one in conversations] == want
    batch = engine.generate_batch(conversations, max_new_tokens=24)
    assert [one.token_ids for one in batch] == want


def test_rows_of_a_batch_are_those_alone():
    model = model_under("int4")
    forward = by_step(model, plain=True)
    alone = [answer(forward, prompt)[0] for prompt in PROMPTS]
    assert together(forward) == alone


def together(forward: Forward, count: int = 12) -> list[list[int]]:
    rows, logits = zip(*(forward.prefill({"input_ids": torch.tensor([p], device=DEVICE)}) for p in PROMPTS))
    tokens = torch.cat(logits).argmax(-1)
    answers = [[int(token)] for token in tokens]
    for _ in range(count - 1):
        tokens = forward.step(rows, tokens).argmax(-1)
        for one, token in zip(answers, tokens.tolist()):
            one.append(token)
    return answers


def test_a_cache_grows_when_it_is_full():
    model = model_under("fp32")
    forward = by_step(model, plain=True)
    want, _ = answer(by_modules(model), PROMPTS[0], 20)
    row, logits = forward.prefill({"input_ids": torch.tensor([PROMPTS[0]], device=DEVICE)})
    assert forward.own_step.takes(row)
    row.cache.storage.buffer = row.cache.storage.buffer[..., :8, :].contiguous()  # room for three more
    got = []
    for _ in range(20):
        got.append(int(logits.argmax(-1)))
        logits = forward.step([row], logits.argmax(-1))
    assert got == want
    assert row.cache.storage.capacity > 25
    assert row.cache.stored_bytes == row.cache.storage.buffer.nbytes


def test_a_cache_is_free_with_its_conversation():
    row, _ = by_step(model_under("fp32"), plain=True).prefill(
        {"input_ids": torch.tensor([[1, 2, 3]], device=DEVICE)}
    )
    storage = weakref.ref(row.cache.storage)
    gc.disable()  # cycles would wait for the collector, and the GPU's memory with them
    try:
        del row
        assert storage() is None
    finally:
        gc.enable()


def test_padded_prompts_go_through_the_modules():
    model = model_under("fp32")
    inputs = {
        "input_ids": torch.tensor([[0, 0, *PROMPTS[0]]], device=DEVICE),
        "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1, 1]], device=DEVICE),
    }
    forward = by_step(model, plain=True)
    row, logits = forward.prefill(inputs)
    assert row.position is None
    other, more = forward.prefill({"input_ids": torch.tensor([PROMPTS[2]], device=DEVICE)})
    tokens = torch.cat((logits, more)).argmax(-1)
    want, start = by_modules(model).prefill(inputs)
    exact = by_modules(model).step([want], start.argmax(-1))
    assert torch.allclose(forward.step([row, other], tokens)[:1], exact, atol=1e-4)


def test_a_step_that_cannot_be_captured_goes_through_the_modules(monkeypatch):
    def refuse(*_):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(captured, "_Step", refuse)
    model = model_under("fp32")
    forward = by_step(model)
    want, _ = answer(by_modules(model), PROMPTS[0])
    got, _ = answer(forward, PROMPTS[0])
    assert got == want
    assert "operation not permitted" in forward.route
    assert together(forward) == [answer(by_modules(model), prompt)[0] for prompt in PROMPTS]


def test_models_that_are_not_known_say_why():
    with pytest.raises(UnknownDecoderError, match="LlamaModel"):
        decoder_of(tiny_models.llama())
    model = tiny_models.glm4v()
    model.get_decoder().layers[1].mlp.register_forward_hook(lambda *_: None)
    with pytest.raises(UnknownDecoderError, match=r"layers\.1 has hooks"):
        decoder_of(model)
    model = tiny_models.glm4v()
    model.get_decoder().layers[0].input_layernorm = torch.nn.LayerNorm(128)
    with pytest.raises(UnknownDecoderError, match=r"layers\.0\.input_layernorm is a LayerNorm"):
        decoder_of(model)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="says what holds without a GPU")
def test_without_a_gpu_the_modules_decode():
    step, reason = captured_step(tiny_models.glm4v())
    assert step is None
    assert reason == "a captured step is for GPUs"
    assert not isinstance(find_step(tiny_models.glm4v(), PLAIN)[0], CapturedStep)


@pytest.mark.gpu
def test_what_cannot_be_captured_is_not(monkeypatch):
    assert why_not(tiny_models.llama().to(DEVICE)) == "its decoder is a LlamaModel, not a Glm4vTextModel"
    model = tiny_models.glm4v().to(DEVICE)
    assert why_not(model) is None
    assert isinstance(Forward(model).own_step, CapturedStep)
    model.lm_head = torch.nn.Identity()
    assert "Identity looks at its inputs" in why_not(model)


@pytest.fixture
def few_shares(monkeypatch):
    """Triton's interpreter takes its time for each program."""
    if DEVICE.type == "cpu":
        monkeypatch.setattr(static_step, "SHARES", 2)


@kernels
@pytest.mark.gpu(interpreted=True)
@pytest.mark.usefixtures("few_shares")
@pytest.mark.parametrize("plan", PLANS if DEVICE.type == "cuda" else ["fp32", "int4"])
def test_kernels_answer_as_the_modules_do(plan):
    """Tokens are equal wherever the first two are further apart than what the order of sums may change."""
    model = model_under(plan, for_kernels=True)
    compared = False
    count, prompts = (12, PROMPTS) if DEVICE.type == "cuda" else (2, PROMPTS[:1])
    for prompt in prompts:
        want, exact = answer(by_modules(model), prompt, count)
        _, logits = along(by_step(model), prompt, want)
        room = {"fp32": 1e-3, "int8-dynamic": 0.06}.get(plan, 0.03) * exact.abs().max()
        assert torch.allclose(logits, exact, rtol=0, atol=room)
        first, second = exact.topk(2).values.T
        clear = (first - second > 2 * room).cpu()
        compared = compared or bool(clear.any())
        assert torch.equal(logits.argmax(-1).cpu()[clear], torch.tensor(want)[clear])
    assert plan == "int8-dynamic" or compared  # codes of inputs change with the last bit


@kernels
@pytest.mark.gpu(interpreted=True)
@pytest.mark.usefixtures("few_shares")
@pytest.mark.parametrize("plan", ["bf16", "int4"])
def test_kernels_rows_of_a_batch_are_those_alone(plan):
    forward = by_step(model_under(plan, for_kernels=True))
    assert forward.own_step.together
    count = 12 if DEVICE.type == "cuda" else 2
    alone = [answer(forward, prompt, count)[0] for prompt in PROMPTS]
    assert together(forward, count) == alone
