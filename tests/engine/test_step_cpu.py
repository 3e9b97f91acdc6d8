"""The compiled step: each product against the exact one, and each answer against the model's own modules'."""

import ctypes
import subprocess

import pytest
import tiny_models
import torch
from test_engine import pocket_conversations
from transformers import MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

from labkit.common.errors import LabError
from labkit.engine.engine import Engine
from labkit.engine.forward import Forward, modules_only
from labkit.engine.step_cpu.compiled import COMPILED, TABLE_GROWTH, CompiledStep, compiled_step
from labkit.engine.step_cpu.decoder import Weights
from labkit.models.processors import TemplateProcessor
from labkit.models.spec import ModelSpec
from labkit.plans.quantize import quantize_
from labkit.quantization import DTYPES, get_scheme
from labkit.quantization.affine import sqnr_db
from labkit.quantization.native import library as native

KINDS = ("fp32", "bf16", "fp16", "int8", "int4")
needs_compiler = pytest.mark.skipif(native.find_compiler() is None, reason="no C++ compiler")
pytestmark = needs_compiler


class Multiplier:
    """One Linear of the library, as `CompiledStep` describes it."""

    def __init__(self, module, dtype, library=None):
        self.weights = Weights(dtype)
        self.linear = self.weights.linear(module)
        self.library = library or native.library()

    def __call__(self, rows, threads=1):
        x = rows.float().contiguous()
        y = torch.empty(len(x), self.linear.out)
        self.library.multiply(ctypes.byref(self.linear), x.data_ptr(), len(x), y.data_ptr(), threads)
        return y


def linear(kind, inputs=576, outputs=192, bias=True, group_size=32):
    torch.manual_seed(0)
    scheme = get_scheme(kind, **({"group_size": group_size} if kind == "int4" else {}))
    dtype = DTYPES.get(kind, torch.bfloat16)
    return scheme.quantize_linear(torch.nn.Linear(inputs, outputs, bias=bias), dtype=dtype), dtype


def exact(module, rows):
    weight = module.dequantize(torch.float32) if hasattr(module, "dequantize") else module.weight
    out = rows.double() @ weight.double().T
    return out if module.bias is None else out + module.bias.double()


FLOORS = {torch.float32: 110, torch.float16: 60, torch.bfloat16: 45}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [True, False])
def test_products_agree_with_the_dequantized_weight(kind, bias):
    module, dtype = linear(kind, bias=bias)
    rows = torch.randn(7, 576, generator=torch.Generator().manual_seed(1)).to(dtype)
    got = Multiplier(module, dtype)(rows)
    assert sqnr_db(exact(module, rows), got) > FLOORS[dtype]
    assert torch.equal(got, got.to(dtype).float())  # rounded as torch would have stored them


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_int4_products_with_every_group_size_and_in_fp32(group_size):
    module, _ = linear("int4", 512, 128, group_size=group_size)
    rows = torch.randn(5, 512, generator=torch.Generator().manual_seed(1))
    assert sqnr_db(exact(module, rows), Multiplier(module, torch.float32)(rows)) > 110


@pytest.mark.parametrize("block", [32, 64])
def test_both_orders_of_int4s_blocks(block):
    module, dtype = linear("int4", 256, 128)
    rows = torch.randn(5, 256, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = exact(module, rows)
    plain = module.relayout(module.packed, module.layout, "plain")
    module._buffers["packed"] = module.relayout(plain, "plain", f"blocks{block}")
    module.layout = f"blocks{block}"
    assert sqnr_db(expected, Multiplier(module, dtype)(rows)) > FLOORS[dtype]


@pytest.mark.parametrize("kind", ["fp32", "int8"])
def test_sizes_that_fill_no_vector(kind):
    module, dtype = linear(kind, 37, 11)
    rows = torch.randn(3, 37, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert sqnr_db(exact(module, rows), Multiplier(module, dtype)(rows)) > FLOORS[dtype]


@pytest.mark.parametrize(
    ("kind", "inputs", "outputs"),
    [*((kind, 576, 192) for kind in KINDS), *((kind, 61, 75) for kind in KINDS if kind != "int4")],
)
def test_a_rows_product_is_the_same_to_the_last_bit_in_any_company(kind, inputs, outputs):
    module, dtype = linear(kind, inputs, outputs)
    multiply = Multiplier(module, dtype)
    rows = torch.randn(17, inputs, generator=torch.Generator().manual_seed(2)).to(dtype)
    alone = torch.cat([multiply(row[None]) for row in rows])
    for count in range(1, 18):
        assert torch.equal(multiply(rows[:count]), alone[:count])
        assert torch.equal(multiply(rows[:count], threads=2), alone[:count])


@pytest.mark.parametrize("flags", ["-march=x86-64-v3", "-march=x86-64", "-march=native"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_form_of_the_vectors_answers_alike(kind, flags, tmp_path_factory, monkeypatch):
    """AVX2 and plain C++, on a machine that has more."""
    if native.platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("flags of x86")
    if flags.endswith("v3") and "avx2" not in native._processor():
        pytest.skip("no AVX2 here")
    path = tmp_path_factory.getbasetemp() / f"step{flags}.so"
    if not path.exists():
        monkeypatch.setattr(native, "CHOICES", ((flags, "-fopenmp"), (flags,)))
        native._compile(native.find_compiler(), path)
    module, dtype = linear(kind)
    rows = torch.randn(5, 576, generator=torch.Generator().manual_seed(1)).to(dtype)
    got = Multiplier(module, dtype, native._bound(path, ""))(rows)
    assert sqnr_db(exact(module, rows), got) > FLOORS[dtype]


def both_ways(model, prompts, count=20):
    """Tokens and logits of each prompt, by the model's modules and by the compiled step; the step is fed the
    modules' tokens, so that one near tie does not hide what follows."""
    found = []
    for prompt in prompts:
        plain, quick = Forward(model, find=modules_only), Forward(model)
        assert quick.own_step is not None, quick.reason
        (row, logits), (other, same) = plain.prefill(prompt), quick.prefill(prompt)
        assert torch.equal(logits, same)
        for _ in range(count):
            token = logits.argmax(-1)
            logits, same = plain.step([row], token, alone=True), quick.step([other], token, alone=True)
            found.append((logits[0].float(), same[0].float()))
    plain, quick = (torch.stack(one) for one in zip(*found))
    return plain, quick


def tiny(kind, name):
    if name == "llama":
        model = tiny_models.llama()
    elif name == "glm4v":
        model = tiny_models.glm4v()
    elif name == "qwen2":
        config = Qwen2Config(**{**tiny_models.llama_config().to_dict(), "model_type": "qwen2"})
        model = tiny_models.random_model(Qwen2ForCausalLM, config)
    elif name == "mistral":
        config = MistralConfig(
            **{**tiny_models.llama_config().to_dict(), "model_type": "mistral", "sliding_window": None}
        )
        model = tiny_models.random_model(MistralForCausalLM, config)
    if kind in DTYPES:
        return model.to(DTYPES[kind])
    model = model.to(torch.bfloat16)
    quantize_(model, tiny_plan(kind), progress=False)
    return model


def tiny_plan(kind):
    from labkit.plans.plan import QuantizationPlan

    rules = [{"role": "decoder", "scheme": kind, **({"group_size": 32} if kind == "int4" else {})}]
    return QuantizationPlan.from_dict({"name": "tiny", "rules": rules, "default": "bf16"})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "glm4v", "qwen2", "mistral"])
def test_the_step_computes_what_the_modules_do(name, kind):
    model = tiny(kind, name)
    words = tiny_models.tokenizer()
    prompts = [{"input_ids": torch.tensor([words.encode(text)])} for text in ("hello", "a longer beginning")]
    plain, quick = both_ways(model, prompts)
    assert sqnr_db(plain, quick) > {"fp32": 100, "fp16": 45}.get(kind, 30)
    if kind == "fp32":
        assert torch.equal(plain.argmax(-1), quick.argmax(-1))


@pytest.mark.parametrize("plan", ["fp32", "bf16", "fp16", "int8", "int4", "article"])
def test_the_pocket_model_answers_with_the_same_tokens(plan):
    """The shipped weights on screens of the benchmark, typed and spoken requests; and that the logits of prompts it was
    never trained for are as near as the dtype's rounding lets them be."""
    import labkit
    from labkit.measure.cost import standard_conversations

    engine = labkit.load("pocket", plan, "cpu", progress=False, **CALIBRATION.get(plan, {}))
    without = Engine(engine.model, engine.processor, spec=engine.spec)
    with native.suspended():
        assert without._forward.own_step is None
    assert engine.route == COMPILED
    for messages in standard_conversations(engine, None, 4):
        quick = engine.generate(messages, max_new_tokens=40).token_ids
        assert_same_but_for_ties(without, messages, quick, DTYPES[engine.plan.default])
    prompts = [engine.prepare(messages) for messages in pocket_conversations()[:3]]
    plain, quick = both_ways(engine.model, prompts, 12)
    assert sqnr_db(plain, quick) > {"fp32": 90, "fp16": 45}.get(plan, 30)


def assert_same_but_for_ties(engine, messages, tokens, dtype):
    """The tokens are the engine's; or the first that is not is one of several that its logits, as the dtype stores
    them, put first but for two steps of its last digit. bf16 has 16 of them between 8 and 9, fp16 128: the last digits of a
    tap are often tied. In fp32 none may differ."""
    forward = engine._forward
    row, logits = forward.prefill(engine.prepare(messages))
    for token in tokens:
        best = logits[0].float().max()
        if token != int(logits.argmax(-1)):
            assert dtype in (torch.bfloat16, torch.float16)
            assert best - logits[0, token] <= 2 * torch.finfo(dtype).eps * best.abs()
            return
        logits = forward.step([row], torch.tensor([token]), alone=True)


CALIBRATION = {"article": {"calibration": 4}}


@pytest.fixture
def llama():
    return tiny_models.llama()


def prompt_of(text="hello"):
    return {"input_ids": torch.tensor([tiny_models.tokenizer().encode(text)])}


def test_a_row_may_change_from_one_way_to_the_other_between_tokens(llama):
    forward, reference = Forward(llama), Forward(llama, find=modules_only)
    row, logits = forward.prefill(prompt_of())
    other, _ = reference.prefill(prompt_of())
    compiled = forward.own_step
    for number in range(150):  # beyond the first buffers
        token = logits.argmax(-1)
        forward.own_step = None if number % 3 == 0 else compiled
        logits, same = forward.step([row], token), reference.step([other], token)
        torch.testing.assert_close(logits, same, rtol=1e-3, atol=1e-3)
    assert row.length == other.length
    for mine, theirs in zip(row.cache.layers, other.cache.layers):
        torch.testing.assert_close(mine.keys, theirs.keys, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(mine.values, theirs.values, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "glm4v"])
def test_a_rows_logits_are_the_same_to_the_last_bit_in_any_company(name, kind):
    """Attention and all, past one block of remembered tokens, for as many rows as a tile has and one more."""
    model = tiny(kind, name)
    forward = Forward(model)
    prompts = [prompt_of("hello " * (2 + number % 4) + "x" * number) for number in range(9)]
    tokens = torch.arange(9) + 3
    alone = [[forward.step([forward.prefill(one)[0]], token[None])] for one, token in zip(prompts, tokens)]
    rows = [forward.prefill(one)[0] for one in prompts]
    assert forward.own_step is not None
    together = forward.step(rows, tokens)
    for number, (expected,) in enumerate(alone):
        assert torch.equal(together[number], expected[0])


@pytest.mark.parametrize("width", [5, 64, 100])
def test_the_likeliest_token_is_torchs(llama, width):
    """The first of several, and not a number where there is one."""
    compiled = Forward(llama).own_step
    logits = torch.randint(0, 9, (6, width), generator=torch.Generator().manual_seed(0)).float()
    logits[1] = -torch.inf
    logits[2, 3] = torch.inf
    logits[4, 2:4] = torch.nan
    best, tokens = compiled.likeliest(logits)
    expected, places = logits.max(dim=-1)
    torch.testing.assert_close(torch.tensor(best), expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(tokens, places)


def test_masked_rows_go_the_modules_way_and_the_others_do_not_notice(llama):
    forward = Forward(llama)
    ids = prompt_of("padded")["input_ids"]
    padded = {"input_ids": ids, "attention_mask": torch.tensor([[0, 0, *[1] * (ids.shape[1] - 2)]])}
    alone, logits = forward.prefill(prompt_of())
    token = logits.argmax(-1)
    expected = forward.step([alone], token)[0]
    rows = [forward.prefill(prompt)[0] for prompt in (padded, prompt_of(), padded)]
    got = forward.step(rows, token.expand(3).contiguous())
    assert torch.equal(got[1], expected)
    assert torch.equal(got[0], got[2])
    assert [row.length for row in rows] == [ids.shape[1] + 1, alone.length, ids.shape[1] + 1]


def test_a_replaced_or_watched_module_is_noticed_at_the_next_prompt(llama):
    forward = Forward(llama)
    row, logits = forward.prefill(prompt_of())
    before = forward.step([row], logits.argmax(-1))
    quantize_(llama, tiny_plan("int8"), progress=False)
    row, logits = forward.prefill(prompt_of())
    after = forward.step([row], logits.argmax(-1))
    assert forward.own_step is not None
    assert not torch.equal(before, after)
    seen = []
    llama.model.layers[0].mlp.register_forward_hook(lambda *_: seen.append(1))
    row, logits = forward.prefill(prompt_of())
    seen.clear()
    forward.step([row], logits.argmax(-1))
    assert seen
    assert "watched" in forward.reason


def test_the_compiled_step_returns_when_nobody_watches_any_more(llama):
    forward = Forward(llama)
    handle = llama.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    forward.prefill(prompt_of())
    assert forward.own_step is None
    handle.remove()
    forward.prefill(prompt_of())
    assert forward.own_step is not None


def test_a_row_of_a_replaced_model_is_not_written_by_the_step_of_the_new_one(llama):
    forward = Forward(llama)
    row, logits = forward.prefill(prompt_of())
    forward.step([row], logits.argmax(-1))
    llama.to(torch.bfloat16)
    forward.prefill(prompt_of())
    assert forward.own_step is not None
    assert not forward.own_step.takes(row)  # its cache is fp32: twice the bytes a value


@pytest.mark.parametrize("token", [-1, 263, 2**40])
def test_a_token_that_the_embedding_does_not_have_is_refused_before_anything_is_appended(llama, token):
    forward = Forward(llama)
    rows = [forward.prefill(prompt_of())[0] for _ in range(2)]
    lengths = [row.length for row in rows]
    with pytest.raises(IndexError, match=str(token)):
        forward.step(rows, torch.tensor([3, token]))
    assert [row.length for row in rows] == lengths


@pytest.mark.parametrize(
    "tensor",
    [
        torch.empty(2, 3, dtype=torch.float16),
        torch.empty(2, 2, dtype=torch.float32),
        torch.empty(3, 2, dtype=torch.float32).T,
        torch.empty(2, 3, dtype=torch.float32, device="meta"),
    ],
    ids=["dtype", "size", "strides", "device"],
)
def test_a_buffer_that_the_library_would_overrun_is_refused(tensor):
    with pytest.raises(ValueError, match=r"wants torch.float32 \[2, 3\]"):
        native.pointer(tensor, torch.float32, 2, 3)


def test_scales_of_another_dtype_are_left_to_torch():
    module, _ = linear("int8")
    module.scale = module.scale.half()
    with pytest.raises(LabError, match="where torch"):
        Weights(torch.bfloat16).linear(module)


def test_positions_beyond_the_table_do_not_move_those_of_rows_beside_them(llama):
    """A row whose position is in the old table comes before one that makes it grow."""
    forward = Forward(llama)
    prompts = [{"input_ids": torch.arange(count)[None] % 250 + 3} for count in (20, TABLE_GROWTH)]
    tokens = torch.tensor([5, 6])
    alone = [
        Forward(llama).step([forward.prefill(prompt)[0]], token[None])
        for prompt, token in zip(prompts, tokens)
    ]
    rows = [forward.prefill(prompt)[0] for prompt in prompts]
    forward.step(rows[:1], tokens[:1])
    rows[0] = forward.prefill(prompts[0])[0]
    assert torch.equal(forward.step(rows, tokens), torch.cat(alone))


@pytest.mark.parametrize("scheme", ["nf4", "int8-dynamic", "llm-int8"])
def test_what_it_does_not_know_is_left_to_torch_with_a_reason(scheme):
    model, _ = tiny_models.pocket()
    model = model.to(torch.bfloat16)
    quantize_(model.model.language_model, scheme, progress=False)
    step, reason = compiled_step(model)
    assert step is None
    assert "left to torch" in reason


def test_a_model_of_another_family_is_left_to_torch():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50))
    with pytest.raises(LabError, match="GPT2LMHeadModel"):
        CompiledStep(model)


def test_without_a_library_answers_come_from_torch(llama, monkeypatch):
    native._library.cache_clear()
    monkeypatch.setenv(native.SWITCH, "0")
    try:
        engine = Engine(llama, TemplateProcessor(tiny_models.tokenizer()), spec=ModelSpec("tiny", "."))
        answer = engine.generate([{"role": "user", "content": "hello"}], max_new_tokens=8)
        assert "switched off" in engine.forward.reason
    finally:
        native._library.cache_clear()
        monkeypatch.delenv(native.SWITCH)
    quick = Engine(llama, TemplateProcessor(tiny_models.tokenizer()), spec=ModelSpec("tiny", "."))
    again = quick.generate([{"role": "user", "content": "hello"}], max_new_tokens=8)
    assert quick.forward.own_step is not None
    assert again.token_ids == answer.token_ids


def test_a_machine_without_a_compiler_is_told_what_to_install(monkeypatch):
    native._library.cache_clear()
    monkeypatch.setattr(native.shutil, "which", lambda name: None)
    try:
        with pytest.raises(native.NativeError, match=r"no C\+\+ compiler .* install g\+\+"):
            native.library()
    finally:
        native._library.cache_clear()


def test_a_compiler_that_fails_leaves_no_file_and_says_why(tmp_path):
    broken = tmp_path / "g++"
    broken.write_text("#!/bin/sh\necho 'step.cpp:1: error: out of ideas' >&2\nexit 1\n")
    broken.chmod(0o755)
    with pytest.raises(native.NativeError, match="out of ideas"):
        native._compile(str(broken), tmp_path / "kept" / "step.so")
    assert list((tmp_path / "kept").iterdir()) == []


def test_sources_compile_without_a_warning(tmp_path):
    """But for those that GCC's own headers give."""
    flags = [
        "-std=c++17",
        "-O1",
        "-fopenmp",
        "-Wall",
        "-Wextra",
        "-Wno-uninitialized",
        "-Wno-maybe-uninitialized",
    ]
    source = native.Path(native.__file__).parent / "step.cpp"
    done = subprocess.run(
        [native.find_compiler(), *flags, "-c", str(source), "-o", str(tmp_path / "step.o")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr.strip()
