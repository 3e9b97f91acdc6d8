"""The static step's cache in 8 bits and in a window: by the reference of its kernels, and by these where they run."""

import copy

import pytest
import tiny_models
import torch
from test_engine import ask, picture
from test_step_gpu import (
    DEVICE,
    PROMPTS,
    along,
    answer,
    by_modules,
    by_step,
    few_shares,  # noqa: F401
    kernels,
    model_under,
    together,
)

from labkit.engine.engine import Engine
from labkit.engine.forward import Forward
from labkit.engine.kv_cache import PLAIN, SINKS, Keeping, Store, quantize_vectors
from labkit.engine.step_gpu import cache as static_cache
from labkit.engine.step_gpu import captured
from labkit.engine.step_gpu.cache import StaticCache, Storage
from labkit.engine.step_gpu.captured import CapturedStep
from labkit.engine.step_gpu.decoder import decoder_of
from labkit.engine.step_gpu.reference import TorchOperations
from labkit.engine.step_gpu.step import KernelOperations
from labkit.measure.anatomy import Anatomy
from labkit.models.processors import TemplateProcessor
from labkit.models.spec import ModelSpec
from labkit.plans.plan import QuantizationPlan, RuntimeOptions
from labkit.quantization.affine import sqnr_db

INT8, WINDOW, BOTH = Keeping(int8=True), Keeping(window=24), Keeping(int8=True, window=24)
KEPT = [INT8, WINDOW, BOTH, Keeping(dtype=torch.bfloat16), Keeping(window=1)]
COUNT = 28  # of tokens: short prompts go round the window too


def exact_answers(plan: str, keeping: Keeping, count: int = COUNT):
    """The model, and what its own modules answer to `PROMPTS`: tokens, and logits."""
    model = model_under(plan)
    return model, [answer(by_modules(model, keeping), prompt, count) for prompt in PROMPTS]


@pytest.mark.parametrize("keeping", KEPT, ids=str)
@pytest.mark.parametrize("plan", ["bf16", "int4"])
def test_tokens_are_those_of_the_modules_with_the_same_cache(plan, keeping):
    model, wanted = exact_answers(plan, keeping)
    for prompt, (tokens, exact) in zip(PROMPTS, wanted):
        got, logits = answer(by_step(model, keeping, plain=True), prompt, COUNT)
        assert got == tokens
        assert torch.allclose(logits, exact, rtol=0, atol=0.02 * exact.abs().max())


@pytest.mark.parametrize("keeping", [INT8, WINDOW, BOTH], ids=str)
def test_what_is_kept_changes_the_logits(keeping):
    model = model_under("fp32")
    _, kept = answer(by_step(model, keeping, plain=True), PROMPTS[0], COUNT)
    _, whole = answer(by_step(model, plain=True), PROMPTS[0], COUNT)
    assert torch.equal(kept[0], whole[0])  # a short prompt is computed on its exact numbers
    assert not torch.allclose(kept[-1], whole[-1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("keeping", [INT8, WINDOW, BOTH], ids=str)
def test_rows_at_different_places_are_those_alone(keeping):
    model, wanted = exact_answers("int4", keeping)
    assert together(by_step(model, keeping, plain=True), COUNT) == [tokens for tokens, _ in wanted]


@pytest.mark.parametrize("runtime", [{"kv_cache": "int8"}, {"kv_cache": "int8", "sliding_window": 24}])
def test_an_engine_answers_to_pictures_alike(runtime):
    model = tiny_models.glm4v()
    processor = TemplateProcessor(tiny_models.tokenizer(), tiny_models.image_processor())
    plan = QuantizationPlan("kept", (), default="fp32", runtime=RuntimeOptions(**runtime))
    engine = Engine(model, processor, spec=ModelSpec("tiny", "."), plan=plan)
    conversations = [
        ask("what is here, and where?", picture(84, 56)),
        ask("hello"),
        ask("?", picture(56, 112)),
    ]
    want = [engine.generate(one, max_new_tokens=COUNT).token_ids for one in conversations]
    engine._forward = by_step(model, engine.forward._keeping, plain=True)
    assert [engine.generate(one, max_new_tokens=COUNT).token_ids for one in conversations] == want
    assert [one.token_ids for one in engine.generate_batch(conversations, max_new_tokens=COUNT)] == want
    # what is counted is what is predicted
    batch = engine.batch(1)
    batch.add(engine.request(conversations[0], max_new_tokens=COUNT))
    while not batch.active:
        batch.step()
    anatomy = Anatomy(None, model, {}, type("Resolved", (), {"plan": plan})())
    room = batch.active[0].row.cache.room
    assert batch.cache_bytes == room * anatomy.kv_cache_bytes_per_token()
    if "sliding_window" in runtime:
        assert batch.cache_bytes == anatomy.kv_cache_bytes(10_000)


@pytest.mark.parametrize("keeping", [PLAIN, *KEPT], ids=str)
@pytest.mark.parametrize("prompt", [1, 3, 5, 28, 29, 80])
def test_a_storage_holds_what_a_store_holds(keeping, prompt):
    vectors = torch.randn(2, 2, 90, 16, generator=torch.Generator().manual_seed(prompt))
    store, cache = Store(keeping), StaticCache(1, keeping)

    def append(start: int, end: int) -> torch.Tensor:
        keys, values = vectors[:, :, start:end]
        cache.layers[0].update(keys[None], values[None])
        return store.append(vectors[:, :, start:end], start)

    append(0, prompt)
    for token in range(prompt, 90):
        kept = append(token, token + 1)
        assert torch.equal(torch.stack(cache.storage.read(0, token + 1, torch.float32)), kept)
    assert cache.get_seq_length() == 90


def test_a_ring_grows_until_it_holds_its_window(monkeypatch):
    monkeypatch.setattr(static_cache, "ROOM", 8)
    model = model_under("fp32")
    wanted, _ = answer(by_modules(model, BOTH), PROMPTS[0], COUNT)
    forward = by_step(model, BOTH, plain=True)
    row, logits = forward.prefill({"input_ids": torch.tensor([PROMPTS[0]], device=DEVICE)})
    got, sizes = [], []
    for _ in range(COUNT):
        got.append(int(logits.argmax(-1)))
        sizes.append(row.cache.stored_bytes)
        logits = forward.step([row], logits.argmax(-1))
    assert got == wanted
    each = 2 * 2 * 2 * (32 + 2)  # layers, k and v, groups, codes and their scale
    assert sizes[0] == 16 * each
    assert sizes[-1] == max(sizes) == (24 + SINKS) * each
    assert row.length == len(PROMPTS[0]) + COUNT  # positions stay true


@pytest.mark.parametrize("keeping", [INT8, BOTH], ids=str)
def test_a_step_that_cannot_be_captured_keeps_the_cache_alike(monkeypatch, keeping):
    def refuse(*_):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(captured, "_Step", refuse)
    model, wanted = exact_answers("fp32", keeping)
    forward = by_step(model, keeping)
    assert together(forward, COUNT) == [tokens for tokens, _ in wanted]
    assert "operation not permitted" in forward.route


# -- the kernels ---------------------------------------------------------------------------------------------

LENGTHS = [0, 3, 27, 28, 29, 150]
PLACES = [5, 3, 27, 40, 29, 150]  # of their next tokens: positions need not be the tokens' numbers
gpu = pytest.mark.gpu(interpreted=True)
precise = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


class Filled:
    """Kernels over random caches of `LENGTHS` tokens, and the same caches for what they are compared with."""

    def __init__(self, dtype: torch.dtype, keeping: Keeping):
        self.decoder = one = decoder_of(tiny_models.glm4v().to(DEVICE, dtype))
        self.generator = torch.Generator().manual_seed(3)
        self.caches = []
        for length in LENGTHS:
            cache = Storage(len(one.layers), keeping)
            keys, values = self.random(2, one.groups, max(length, 1), one.head_dim)
            cache.reserve(length + 1, keys[None])
            cache.buffer.zero_()
            for layer in range(len(one.layers) if length else 0):
                cache.write(layer, keys + layer, values - layer, 0)
            cache.length = length
            self.caches.append(cache)
        self.kernels = KernelOperations(one, len(LENGTHS), keeping)
        places = [self.kernels.addresses(cache) for cache in self.caches]
        lines = [
            (at, cache.capacity, cache.length, place, scales)
            for (at, scales), cache, place in zip(places, self.caches, PLACES)
        ]
        self.kernels.state.copy_(torch.tensor(lines).T)

    def random(self, *sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=self.generator).to(DEVICE, self.decoder.dtype)

    def in_torch(self) -> TorchOperations:
        """The reference, over copies of the caches."""
        return TorchOperations(self.decoder, copy.deepcopy(self.caches), PLACES)


@kernels
@gpu
@precise
@pytest.mark.parametrize("keeping", [INT8, WINDOW, BOTH, Keeping(dtype=torch.float16)], ids=str)
def test_kernels_append_what_the_reference_appends(dtype, keeping):
    """Values to the last bit; keys, whose cosines differ in it, by one step of 8 bits at most."""
    filled = Filled(dtype, keeping)
    one, layer = filled.decoder, 1
    parts = filled.random(1, len(LENGTHS), (one.heads + 2 * one.groups) * one.head_dim)
    reference = filled.in_torch()
    before = [cache.buffer.clone() for cache in filled.caches]
    want, got = (operations.rotate(parts, None, layer) for operations in (reference, filled.kernels))
    assert sqnr_db(want.double(), got.double()) > (38 if dtype == torch.bfloat16 else 90)
    for index, (cache, other) in enumerate(zip(filled.caches, reference._caches)):
        slot = keeping.slots(LENGTHS[index], LENGTHS[index] + 1).item()
        value = parts[0, index].view(-1, one.head_dim)[-one.groups :]
        stored = cache.buffer[layer, 1, :, slot]
        if keeping.int8:
            codes, scale = quantize_vectors(value)
            assert torch.equal(stored, codes)
            assert torch.equal(cache.scales[layer, 1, :, slot], scale)
            difference = cache.buffer[layer, 0, :, slot].int() - other.buffer[layer, 0, :, slot].int()
            assert difference.abs().max() <= (1 if dtype == torch.float32 else 2)
        else:
            same = value.to(stored.dtype)
            assert torch.equal(stored, same) or (DEVICE.type == "cpu" and sqnr_db(same, stored) > 42)
        keys = (one_.read(layer, LENGTHS[index] + 1, torch.float64)[0] for one_ in (other, cache))
        assert sqnr_db(*keys) > 38
        untouched = torch.ones(cache.capacity, dtype=torch.bool)
        untouched[slot] = False
        assert torch.equal(cache.buffer[layer][:, :, untouched], before[index][layer][:, :, untouched])
        assert torch.equal(cache.buffer[0], before[index][0])  # another layer's


@kernels
@gpu
@pytest.mark.usefixtures("few_shares")
@precise
@pytest.mark.parametrize("keeping", [INT8, WINDOW, BOTH, Keeping(dtype=torch.float16)], ids=str)
def test_kernels_attend_to_what_is_kept(dtype, keeping):
    """Against double precision over the dequantized numbers; the rows are of different lengths."""
    filled = Filled(dtype, keeping)
    one, layer = filled.decoder, 1
    filled.kernels.rotate(
        filled.random(2, len(LENGTHS), (one.heads + 2 * one.groups) * one.head_dim), None, layer
    )
    query = filled.random(len(LENGTHS), one.heads, one.head_dim)
    got = filled.kernels.attend(query, layer).view(query.shape)
    for index, cache in enumerate(filled.caches):
        keys, values = (each.double() for each in cache.read(layer, LENGTHS[index] + 1, dtype))
        grouped = query[index].double().view(one.groups, -1, one.head_dim)
        weights = (grouped @ keys.mT * one.scaling).softmax(-1)
        exact = (weights @ values).view(one.heads, -1)
        assert sqnr_db(exact, got[index].double()) > (38 if dtype == torch.bfloat16 else 90)


@kernels
@gpu
@pytest.mark.usefixtures("few_shares")
@pytest.mark.parametrize("keeping", [INT8, Keeping(window=4), Keeping(int8=True, window=4)], ids=str)
@pytest.mark.parametrize("plan", ["fp32", "bf16", "int4"] if DEVICE.type == "cuda" else ["fp32", "bf16"])
def test_captured_logits_are_those_of_the_modules_with_the_same_cache(plan, keeping):
    """Along the tokens that the modules choose: in bf16 two may be so near that the order of sums decides."""
    model = model_under(plan, for_kernels=True)
    count, prompts = (COUNT, PROMPTS) if DEVICE.type == "cuda" else (5, [PROMPTS[0], PROMPTS[2]])
    forward = by_step(model, keeping)
    for prompt in prompts:
        tokens, exact = answer(by_modules(model, keeping), prompt, count)
        row, logits = along(forward, prompt, tokens)
        assert forward.own_step.takes(row)
        assert forward.route == "one CUDA graph a token"
        assert torch.allclose(
            logits, exact, rtol=0, atol=(1e-3 if plan == "fp32" else 0.04) * exact.abs().max()
        )
        if plan == "fp32":
            assert logits.argmax(-1).tolist() == tokens


@kernels
@gpu
@pytest.mark.usefixtures("few_shares")
def test_captured_rows_of_a_batch_are_those_alone():
    forward = by_step(model_under("bf16", for_kernels=True), Keeping(int8=True, window=4))
    count = COUNT if DEVICE.type == "cuda" else 3
    alone = [answer(forward, prompt, count)[0] for prompt in PROMPTS]
    assert together(forward, count) == alone


@pytest.mark.gpu
@pytest.mark.parametrize("runtime", [{"kv_cache": "int8"}, {"sliding_window": 24}])
def test_a_plans_cache_is_no_reason_against_the_captured_step(runtime):
    from labkit.engine.kv_cache import keeping_of

    model = tiny_models.glm4v().to(DEVICE)
    forward = Forward(model, keeping_of(RuntimeOptions(**runtime)))
    assert isinstance(forward.own_step, CapturedStep)
    row, _ = forward.prefill({"input_ids": torch.tensor([[5, 6, 7]], device=DEVICE)})
    assert forward.own_step.takes(row)
    forward.step([row], torch.tensor([8], device=DEVICE), alone=True)
    assert forward.route == "one CUDA graph a token"
