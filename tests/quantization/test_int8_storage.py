"""Embeddings and convolutions stored in 8 bits: the same answers nearly, half the bytes, and only where asked."""

import copy

import pytest
import tiny_models
import torch
from torch import nn

from labkit.plans.plan import PlanError, QuantizationPlan
from labkit.plans.quantize import quantize_, weights_bytes
from labkit.quantization import SchemeError, get_scheme
from labkit.quantization.affine import sqnr_db
from labkit.quantization.int8_storage import StoredInt8

MODULES = {
    "embedding": (nn.Embedding(50, 64, padding_idx=3), torch.arange(12).view(3, 4)),
    "conv1d": (nn.Conv1d(8, 16, 3, stride=2), torch.randn(2, 8, 20)),
    "conv2d": (nn.Conv2d(4, 8, 2, bias=False), torch.randn(2, 4, 6, 6)),
    "conv3d": (nn.Conv3d(3, 8, 2, stride=2), torch.randn(2, 3, 4, 4, 4)),
    "grouped": (nn.Conv1d(8, 8, 3, groups=4, padding="same"), torch.randn(2, 8, 9)),
}


@pytest.mark.parametrize("name", MODULES)
def test_it_answers_nearly_as_before_and_holds_the_predicted_bytes(name):
    module, inputs = MODULES[name]
    scheme = get_scheme("int8")
    stored = scheme.quantize_module(module, dtype=torch.float32)
    assert isinstance(stored, StoredInt8)
    assert isinstance(stored, type(module))
    with torch.no_grad():
        assert sqnr_db(module(inputs), stored(inputs)) > 40
    assert "weight" not in stored.state_dict()
    assert scheme.resident_bytes(stored) == scheme.predict_module_bytes(module, dtype=torch.float32)
    assert sqnr_db(module.weight, stored.weight) > 40
    assert "weight" in module.state_dict()  # the original is as it was


@pytest.mark.parametrize("name", MODULES)
def test_its_state_fills_an_empty_one_made_from_the_skeleton(name):
    module, inputs = MODULES[name]
    stored = get_scheme("int8").quantize_module(module, dtype=torch.bfloat16)
    with torch.device("meta"):
        skeleton = copy.deepcopy(module).to("meta")
    empty = get_scheme("int8").empty_module(skeleton, device="cpu", dtype=torch.bfloat16)
    empty.load_state_dict(stored.state_dict())
    inputs = inputs.bfloat16() if inputs.is_floating_point() else inputs
    with torch.no_grad():
        assert torch.equal(empty(inputs), stored(inputs))
        assert torch.equal(copy.deepcopy(stored)(inputs), stored(inputs))
        assert stored(inputs).dtype == torch.bfloat16


def test_an_embedding_with_a_forward_of_its_own_keeps_it():
    class Scaled(nn.Embedding):
        def forward(self, ids):
            return super().forward(ids) * 3

    module = Scaled(20, 32)
    stored = get_scheme("int8").quantize_module(module)
    assert sqnr_db(module(torch.arange(5)), stored(torch.arange(5))) > 40


def plan(*rules, **more):
    return QuantizationPlan.from_dict({"name": "p", "rules": list(rules), "default": "fp32", **more})


EVERYTHING = (
    {"match": "re:.*", "modules": ["embedding", "conv"], "scheme": "int8"},
    {"match": "re:.*", "scheme": "int8"},
)


def test_the_pocket_model_with_all_its_weights_in_8_bits():
    model, processor = tiny_models.pocket()
    from labkit.loading.calibration import default_calibration

    batch = default_calibration(processor, ("image", "audio"), 2)[1]
    with torch.inference_mode():
        expected = model(**batch).logits
    linears_only = plan(EVERYTHING[1]).resolve(model).predicted_bytes
    resolved = quantize_(model, plan(*EVERYTHING), progress=False)
    assert weights_bytes(model) == resolved.predicted_bytes < 0.75 * linears_only
    assert isinstance(model.get_input_embeddings(), StoredInt8)
    assert isinstance(model.model.visual.downsample, StoredInt8)
    with torch.inference_mode():
        assert sqnr_db(expected, model(**batch).logits) > 15
    with pytest.raises(PlanError, match="quantized already"):
        quantize_(model, plan(*EVERYTHING), progress=False)


def test_rules_mean_linears_unless_they_say_otherwise():
    model = tiny_models.llama()
    assert "model.embed_tokens" not in plan(EVERYTHING[1]).resolve(model).schemes
    rule = {"role": "embedding", "modules": "embedding", "scheme": "int8"}
    resolved = plan(rule).resolve(model)
    assert list(resolved.schemes) == ["model.embed_tokens"]
    assert QuantizationPlan.from_dict(plan(rule).to_dict()) == plan(rule)
    assert not next(part for part in resolved.parts if part.module == "model.embed_tokens").is_linear


def test_a_tied_embedding_is_left_alone():
    from transformers import LlamaForCausalLM

    config = tiny_models.llama_config()
    config.tie_word_embeddings = True
    model = LlamaForCausalLM(config)
    rule = {"role": "embedding", "modules": "embedding", "scheme": "int8"}
    with pytest.raises(PlanError, match="only tied Linears"):
        plan(rule).resolve(model)
    resolved = plan({**rule, "optional": True}).resolve(model)
    assert not resolved.schemes
    assert any(
        "model.embed_tokens is left alone: its weight is tied to lm_head" in note for note in resolved.notes
    )


def test_schemes_and_kinds_that_do_not_fit_are_refused():
    model = tiny_models.llama()
    with pytest.raises(PlanError, match=r"int4 does not replace a module of the kind embedding; int8 can"):
        plan({"role": "embedding", "modules": "embedding", "scheme": "int4"}).resolve(model)
    with pytest.raises(PlanError, match=r"matches no conv; modules of these kinds are none"):
        plan({"match": "re:.*", "modules": "conv", "scheme": "int8"}).resolve(model)
    with pytest.raises(
        PlanError, match=r"rule 1: unknown kind of modules 'norm'; known are linear, embedding, conv"
    ):
        plan({"match": "re:.*", "modules": "norm", "scheme": "int8"})
    with pytest.raises(SchemeError, match="meta device"):
        get_scheme("int8").quantize_module(nn.Embedding(4, 4, device="meta"))
