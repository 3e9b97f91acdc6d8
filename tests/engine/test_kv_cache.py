"""The KV cache in 8 bits and in a window: what is stored, what is dropped, and what is attended to."""

import pytest
import tiny_models
import torch
from test_engine import ask, picture, pocket_conversations
from transformers import MistralForCausalLM

from labkit.engine.engine import Engine
from labkit.engine.forward import Forward
from labkit.engine.kv_cache import (
    GROWTH,
    SINKS,
    Band,
    Keeping,
    Store,
    attend_band,
    dequantize_vectors,
    quantize_vectors,
)
from labkit.loading.load import load
from labkit.measure.anatomy import Anatomy
from labkit.models.checkpoint import LoadError
from labkit.models.processors import TemplateProcessor
from labkit.models.spec import ModelSpec
from labkit.plans.plan import QuantizationPlan
from labkit.plans.quantize import quantize_
from labkit.quantization.affine import sqnr_db


def plan_with(name="kept", default="fp32", **runtime):
    return QuantizationPlan.from_dict({"name": name, "rules": [], "default": default, "runtime": runtime})


def engine_with(model, processor, **runtime):
    return Engine(model, processor, spec=ModelSpec("tiny", "."), plan=plan_with(**runtime))


@pytest.fixture(scope="module")
def llama():
    return tiny_models.llama(), TemplateProcessor(tiny_models.tokenizer())


@pytest.fixture(scope="module")
def glm4v():
    return tiny_models.glm4v(), TemplateProcessor(tiny_models.tokenizer(), tiny_models.image_processor())


def hello(text="hello"):
    return [{"role": "user", "content": text}]


def vectors(count, heads=2, width=16, seed=0):
    return torch.randn(1, heads, count, width, generator=torch.Generator().manual_seed(seed))


# -- the store -----------------------------------------------------------------------------------------------


def test_eight_bits_with_a_scale_for_each_vector_keep_forty_decibels():
    many = vectors(64) * torch.logspace(-3, 3, 64)[:, None]  # tokens of very different size
    codes, scale = quantize_vectors(many)
    assert codes.dtype == torch.int8
    assert scale.shape == (1, 2, 64, 1)
    back = dequantize_vectors(codes, scale, torch.float32)
    for token in range(64):
        assert sqnr_db(many[:, :, token], back[:, :, token]) > 38
    assert torch.equal(quantize_vectors(torch.zeros(2, 4))[0], torch.zeros(2, 4, dtype=torch.int8))


@pytest.mark.parametrize("keeping", [Keeping(), Keeping(dtype=torch.bfloat16), Keeping(int8=True)])
def test_tokens_stored_one_by_one_are_those_stored_together(keeping):
    all_at_once, one_by_one = Store(keeping), Store(keeping)
    given = vectors(200)
    whole = all_at_once.append(given, 0)
    for token in range(200):
        last = one_by_one.append(given[:, :, token : token + 1], token)
    assert torch.equal(whole, last)
    assert all_at_once.stored_bytes == one_by_one.stored_bytes


@pytest.mark.parametrize("window", [1, 7, 64, 300])
@pytest.mark.parametrize("prompt", [0, 1, 3, 5, 9, 80, 200])
def test_a_window_holds_the_first_four_and_the_last(window, prompt):
    keeping = Keeping(window=window)
    store, given = Store(keeping), torch.arange(260.0).expand(1, 1, 260)[..., None]
    if prompt:
        store.append(given[:, :, :prompt], 0)
    for token in range(prompt, 260):
        kept = store.append(given[:, :, token : token + 1], token).flatten().tolist()
        there = [one for one in range(token + 1) if one < SINKS or one > token - window]
        assert sorted(kept) == there
    assert store.stored_bytes <= 4 * (window + SINKS)


def test_int8_and_a_window_together():
    both = Store(Keeping(int8=True, window=8))
    given = vectors(50)
    both.append(given[:, :, :30], 0)
    for token in range(30, 50):
        kept = both.append(given[:, :, token : token + 1], token)
    order = torch.tensor([0, 1, 2, 3, *sorted(range(42, 50), key=lambda t: (t - SINKS) % 8)])
    assert torch.equal(kept, dequantize_vectors(*quantize_vectors(given[:, :, order]), torch.float32))


@pytest.mark.parametrize("window", [1, 5, 100, 400])
def test_a_prompt_attends_over_its_window_block_by_block(window):
    length = 600
    query, key, value = vectors(length, 4), vectors(length, 2, seed=1), vectors(length, 2, seed=2)
    own, seen = torch.arange(length)[:, None], torch.arange(length)
    mask = (seen <= own) & ((seen > own - window) | (seen < SINKS))
    k, v = (one.repeat_interleave(2, 1) for one in (key, value))
    expected = torch.nn.functional.scaled_dot_product_attention(query, k, v, attn_mask=mask)
    got = attend_band(query, Band(key, window), Band(value, window), None)
    torch.testing.assert_close(got, expected.transpose(1, 2), rtol=1e-4, atol=1e-5)


# -- the engine ----------------------------------------------------------------------------------------------

RUNTIMES = [{"kv_cache": "int8"}, {"sliding_window": 24}, {"kv_cache": "int8", "sliding_window": 24}]
LONG = "a longer beginning than the window has room for, so that it slides"


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_batch_answers_as_each_alone(glm4v, runtime):
    engine = engine_with(*glm4v, **runtime)
    conversations = [ask(LONG, picture(84, 56)), hello(), ask("?", picture(56, 112, 1)), hello(LONG * 3)]
    alone = [engine.generate(one, max_new_tokens=40).token_ids for one in conversations]
    together = engine.generate_batch(conversations, max_new_tokens=40)
    assert [one.token_ids for one in together] == alone


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("scheme", ["bf16", "int8", "llm-int8"])
def test_logits_are_the_same_to_the_last_bit_in_any_company(runtime, scheme):
    model, processor = tiny_models.pocket()
    model = model.to(torch.bfloat16)
    if scheme != "bf16":
        quantize_(model.model.language_model, scheme, progress=False)
    engine = engine_with(model, processor, **runtime)
    forward = engine._forward
    prompts = [engine.prepare(messages) for messages in pocket_conversations()]

    def decoded(chosen):
        rows, logits = zip(*(forward.prefill(prompt) for prompt in chosen))
        seen = [torch.cat(logits)]
        for _ in range(6):
            seen.append(forward.step(rows, seen[-1].argmax(-1)))
        return torch.stack(seen)

    alone = torch.cat([decoded([prompt]) for prompt in prompts], 1)
    assert torch.equal(decoded(prompts), alone)


def test_a_window_wider_than_the_conversation_changes_nothing(glm4v):
    plain = engine_with(*glm4v)
    wide = engine_with(*glm4v, sliding_window=500)
    for messages in (hello(LONG), ask("?", picture(84, 56))):
        expected = plain.generate(messages, max_new_tokens=30).token_ids
        assert wide.generate(messages, max_new_tokens=30).token_ids == expected


def test_prompt_and_answer_see_the_same_window(llama):
    """Tokens fed one by one give the logits that the prompt as a whole gives."""
    model, processor = llama
    engine = engine_with(model, processor, sliding_window=24)
    ids = engine.prepare(hello(LONG))["input_ids"]
    assert ids.shape[1] > 60
    _, whole = engine._forward.prefill({"input_ids": ids})
    row, logits = engine._forward.prefill({"input_ids": ids[:, :10]})
    for token in ids[0, 10:]:
        logits = engine._forward.step([row], token[None])
    torch.testing.assert_close(logits, whole, rtol=1e-3, atol=1e-4)
    _, unbounded = engine_with(model, processor)._forward.prefill({"input_ids": ids})
    assert not torch.allclose(whole, unbounded, rtol=1e-2, atol=1e-2)


def test_a_window_without_sinks_is_what_mistral_has(llama, monkeypatch):
    """transformers' own sliding window, on the same weights, where nothing is kept at the beginning."""
    model, processor = llama
    config = model.config.to_dict() | {"sliding_window": 24, "model_type": "mistral"}
    from transformers import MistralConfig

    mistral = MistralForCausalLM(MistralConfig(**config)).eval()
    mistral.load_state_dict(model.state_dict())
    monkeypatch.setattr("labkit.engine.kv_cache.SINKS", 0)
    monkeypatch.setitem(globals(), "SINKS", 0)  # `engine_with` and the counts here read it too
    engine = engine_with(model, processor, sliding_window=24)
    inputs = engine.prepare(hello(LONG))
    expected = mistral.generate(**inputs, max_new_tokens=40, do_sample=False)
    assert (
        engine.generate(hello(LONG), max_new_tokens=40).token_ids
        == expected[0, inputs["input_ids"].shape[1] :].tolist()
    )


def test_int8_logits_are_near_those_of_the_exact_cache(llama):
    exact, rounded = engine_with(*llama), engine_with(*llama, kv_cache="int8")
    ids = exact.prepare(hello(LONG))["input_ids"]
    (row, first), (other, same) = (one._forward.prefill({"input_ids": ids}) for one in (exact, rounded))
    assert torch.equal(first, same)  # a prompt is computed on its exact numbers
    for token in range(1, 20):
        step = torch.tensor([token])
        a, b = exact._forward.step([row], step), rounded._forward.step([other], step)
        assert 30 < sqnr_db(a, b) < 90


@pytest.mark.parametrize(
    ("runtime", "kept"),
    [({}, 256), ({"kv_cache": "bf16"}, 256), ({"kv_cache": "int8"}, 256), ({"sliding_window": 40}, 44)],
)
def test_the_bytes_of_a_cache_are_those_that_are_predicted(llama, runtime, kept):
    model, processor = llama
    engine = engine_with(model, processor, **runtime)
    batch = engine.batch(1)
    batch.add(engine.request(hello(), max_new_tokens=200))
    while batch.active or batch.waiting:
        batch.step()
        if batch.active and batch.active[0].row.length > GROWTH + 1:
            break
    resolved = type("Resolved", (), {"plan": engine.plan})()
    anatomy = Anatomy(None, model, {}, resolved)
    assert batch.cache_bytes == kept * anatomy.kv_cache_bytes_per_token()
    assert anatomy.kv_cache_bytes(256) == batch.cache_bytes
    assert batch.active[0].row.length == GROWTH + 2  # positions stay true


def test_the_9bs_cache_is_half_in_8_bits_and_ends_growing_in_a_window(monkeypatch):
    from labkit.measure.anatomy import dissect

    big = dissect("autoglm-phone-9b", "int8-kv")
    assert big.kv_cache_bytes_per_token() == 2 * 40 * 2 * (128 + 2)
    window = big.under("window")
    assert window.kv_cache_bytes(25_480) == (4096 + SINKS) * 40_960
    assert window.kv_cache_bytes(100) == 100 * 40_960


def test_a_model_with_windows_of_its_own_refuses_a_plans(tmp_path):
    config = tiny_models.llama_config().to_dict() | {"sliding_window": 16, "model_type": "mistral"}
    from transformers import MistralConfig

    model = tiny_models.random_model(MistralForCausalLM, MistralConfig(**config))
    model.save_pretrained(tmp_path)
    tiny_models.tokenizer().save_pretrained(tmp_path)
    assert Forward(load(tmp_path, "bf16", "cpu", progress=False).model).way == "single"
    with pytest.raises(
        LoadError, match="plan int8-kv: runtime kv_cache and sliding_window are for models whose"
    ):
        load(tmp_path, "int8-kv", "cpu", progress=False)


def test_vllm_does_not_take_them():
    from labkit.common.errors import LabError
    from labkit.measure.anatomy import dissect
    from labkit.service.vllm.command import VllmOptions, check_plan

    big = dissect("autoglm-phone-9b", "int8-kv")
    with pytest.raises(LabError, match="the runtime options of the plan int8-kv are for the lab's engine"):
        check_plan(big.resolved, big.skeleton, VllmOptions())
    check_plan(big.under("bf16").resolved, big.skeleton, VllmOptions())
