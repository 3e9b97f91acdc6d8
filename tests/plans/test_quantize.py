"""quantize_ on whole models: bytes as predicted, outputs near, nothing left behind."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

from labkit.plans.plan import PlanError, QuantizationPlan
from labkit.plans.quantize import quantize_, weights_bytes
from labkit.quantization import QuantizedLinear, SchemeError
from labkit.quantization.affine import sqnr_db

PRESETS = ["fp32", "fp16", "bf16", "int8", "int8-dynamic", "int4", "nf4", "llm-int8"]


@pytest.fixture(scope="module")
def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=160,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        initializer_range=0.15,
    )
    return LlamaForCausalLM(config).eval()


def quantized(model, plan, **options):
    model = copy.deepcopy(model)
    return model, quantize_(model, plan, progress=False, **options)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_on_a_language_model_hold_the_predicted_bytes_and_answer_nearly_the_same(llama, preset):
    model, resolved = quantized(llama, preset)
    assert weights_bytes(model) == resolved.predicted_bytes
    ids = torch.arange(24)[None]
    with torch.inference_mode():
        expected, got = llama(ids).logits, model(ids).logits
    assert sqnr_db(expected, got) > {"int4": 5, "nf4": 5}.get(preset, 25)
    assert weights_bytes(model) == resolved.predicted_bytes
    assert resolved.predicted_bytes == QuantizationPlan.preset(preset).resolve(llama).predicted_bytes


def test_prediction_on_the_meta_device_is_the_same(llama):
    with torch.device("meta"):
        ghost = type(llama)(llama.config)
    for preset in PRESETS:
        plan = QuantizationPlan.preset(preset)
        assert plan.resolve(ghost).predicted_bytes == plan.resolve(llama).predicted_bytes


def test_order_of_bytes_and_of_quality(llama):
    ids = torch.arange(100)[None]
    size, quality = {}, {}
    with torch.inference_mode():
        expected = llama(ids).logits
        for name in ["fp32", "bf16", "int8", "int4", "nf4"]:
            model, resolved = quantized(llama, name)
            size[name], quality[name] = resolved.predicted_bytes, sqnr_db(expected, model(ids).logits)
        model, resolved = quantized(llama, QuantizationPlan.uniform("int4", num_bits=3))
        size["3 bits"], quality["3 bits"] = resolved.predicted_bytes, sqnr_db(expected, model(ids).logits)
    assert size["fp32"] > size["bf16"] > size["int8"] > size["int4"] > size["3 bits"]
    assert quality["fp32"] >= quality["bf16"] >= quality["int8"] - 1
    assert quality["int8"] > quality["int4"] + 8
    assert quality["int4"] > quality["3 bits"] + 3
    assert quality["int8"] > quality["nf4"] + 8


def test_computed_tables_stay_in_fp32_and_the_rest_takes_the_default(llama):
    model, _ = quantized(llama, "int8")
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, llama.model.rotary_emb.inv_freq)
    assert model.model.norm.weight.dtype == model.model.embed_tokens.weight.dtype == torch.bfloat16
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_tied_head_stays_tied_and_a_named_one_is_quantized(llama):
    model, _ = quantized(llama, "int4")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    plan = QuantizationPlan.from_dict({"name": "p", "rules": [{"match": "lm_head", "scheme": "int8"}]})
    model, resolved = quantized(llama, plan)
    assert isinstance(model.lm_head, QuantizedLinear)
    assert weights_bytes(model) == resolved.predicted_bytes


def test_role_rules_find_the_parts_of_a_known_family(llama):
    plan = {"name": "p", "rules": [{"role": "decoder", "scheme": "int4"}], "default": "fp32"}
    model, resolved = quantized(llama, QuantizationPlan.from_dict(plan))
    assert len(resolved.schemes) == 14
    assert set(resolved.bytes_by_role) == {"embedding", "decoder", "other"}
    assert weights_bytes(model) == resolved.predicted_bytes


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.filterwarnings("ignore:plan ")
def test_presets_work_on_any_module_with_fp32_inputs(preset):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.LayerNorm(64), nn.Linear(64, 96), nn.GELU(),
        nn.TransformerEncoderLayer(96, 4, 192, batch_first=True), nn.Linear(96, 10), nn.Linear(10, 3),
    ).eval()  # fmt: skip
    x = torch.randn(2, 5, 64)
    expected = model(x)
    resolved = quantize_(model, preset, progress=False)
    assert weights_bytes(model) == resolved.predicted_bytes
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            got = model(x)
        assert sqnr_db(expected, got) > (11 if preset in ("int4", "nf4") else 24)


def test_conv_and_batch_norm_run_in_the_default_dtype():
    model = nn.Sequential(nn.Conv1d(2, 8, 3), nn.BatchNorm1d(8), nn.Flatten(), nn.Linear(48, 4)).eval()
    resolved = quantize_(model, "int8", progress=False)
    assert model(torch.randn(3, 2, 8)).shape == (3, 4)
    assert weights_bytes(model) == resolved.predicted_bytes


def test_a_module_used_twice_is_replaced_in_both_places():
    shared = nn.Linear(64, 64)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)})
    resolved = quantize_(model, "int8", progress=False)
    assert model["a"] is model["b"][0]
    assert isinstance(model["a"], QuantizedLinear)
    assert weights_bytes(model) == resolved.predicted_bytes


def test_originals_are_freed():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    references = [weakref.ref(linear.weight) for linear in model]
    quantize_(model, "int8", progress=False)
    gc.collect()
    assert [reference() for reference in references] == [None, None]


def test_a_plan_that_does_not_fit_changes_nothing():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(65, 64))
    plan = QuantizationPlan.uniform("int4")
    with pytest.raises(PlanError, match="1: group_size 64 does not divide 65"):
        quantize_(model, plan, progress=False)
    assert type(model[0]) is nn.Linear
    assert model[0].weight.dtype == torch.float32


def test_what_cannot_be_quantized_is_refused_by_name():
    with pytest.raises(PlanError, match="one Linear and cannot be replaced in place"):
        quantize_(nn.Linear(64, 64), "int8", progress=False)
    with pytest.raises(PlanError, match="meta device"):
        quantize_(nn.Sequential(nn.Linear(64, 64, device="meta")), "int8", progress=False)
    model = nn.Sequential(nn.Linear(64, 64))
    model[0].weight.data.fill_(float("inf"))
    with pytest.raises(SchemeError, match="0: the weight holds values that are not finite"):
        quantize_(model, "int8", progress=False)
    model[0].weight.data.zero_()
    quantize_(model, "int8", progress=False)
    with pytest.raises(PlanError, match="quantized already"):
        quantize_(model, "int8", progress=False)
    with pytest.raises(PlanError, match="no plan file or preset"):
        quantize_(model, "int5", progress=False)


def test_state_dict_of_a_quantized_model_is_plain_tensors_and_loads_again(llama):
    for preset in PRESETS:
        model, _ = quantized(llama, preset)
        other, _ = quantized(llama, preset)
        for tensor in [*other.parameters(), *other.buffers()]:
            if tensor.dtype in (torch.uint8, torch.int8):
                tensor.zero_()
        state = model.state_dict()
        assert all(isinstance(value, torch.Tensor) for value in state.values())
        other.load_state_dict(state)
        ids = torch.arange(8)[None]
        with torch.inference_mode():
            assert torch.equal(model(ids).logits, other(ids).logits)


def test_bitsandbytes_own_modules_are_counted_with_their_state():
    import bitsandbytes

    layer = bitsandbytes.nn.Linear4bit(128, 64, bias=False, quant_type="nf4", compute_dtype=torch.bfloat16)
    layer.load_state_dict(nn.Linear(128, 64, bias=False).state_dict())
    layer.to("cpu")
    from labkit.quantization import get_scheme

    assert weights_bytes(nn.Sequential(layer)) == get_scheme("nf4").predict_bytes(64, 128, False)


@pytest.mark.gpu
@pytest.mark.parametrize("preset", PRESETS)
def test_presets_on_cuda(llama, preset):
    model = copy.deepcopy(llama).cuda()
    resolved = quantize_(model, preset, progress=False)
    ids = torch.arange(40, device="cuda")[None]
    with torch.inference_mode():
        expected, got = llama.cuda()(ids).logits, model(ids).logits
        one = model(ids[:, :1]).logits
    assert weights_bytes(model) == resolved.predicted_bytes
    floor = {"int4": 5, "nf4": 5, "int8-dynamic": 22, "llm-int8": 22}.get(preset, 25)
    assert sqnr_db(expected, got) > floor
    assert torch.isfinite(one).all()
    moved = quantized(llama.cpu(), preset)[0].cuda()
    with torch.inference_mode():
        assert sqnr_db(expected, moved(ids).logits) > floor
