"""Logits are fp32: neighbouring coordinates must not tie because a head's sums were rounded to bf16."""

import pytest
import tiny_models
import torch

from labkit.engine.forward import Forward
from labkit.engine.step_cpu.compiled import COMPILED
from labkit.plans.plan import QuantizationPlan
from labkit.plans.quantize import quantize_
from labkit.quantization.affine import sqnr_db
from labkit.quantization.logits import gives_logits, keep_logits_
from labkit.quantization.native import library as native

KINDS = ("bf16", "fp16", "int8", "int4", "nf4", "int8-dynamic")
IDS = torch.tensor([[260, 72, 105, 33, 258]])


def quantized(kind, default="bf16", seed=0):
    """A tiny Llama whose head has a scheme of its own."""
    torch.manual_seed(seed)
    model = tiny_models.llama(seed)
    model.lm_head = torch.nn.Linear(128, 320, bias=False)
    rules = [{"role": "lm_head", "scheme": kind}] if kind != default else []
    plan = QuantizationPlan.from_dict({"name": "head", "rules": rules, "default": default})
    quantize_(model, plan, progress=False)
    return model.eval()


def weight_of(head):
    return head.dequantize(torch.float32) if hasattr(head, "dequantize") else head.weight.float()


def prefilled(model):
    """Logits after a prompt, and what the head was given."""
    seen = []
    head = model.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    _, logits = Forward(model).prefill({"input_ids": IDS})
    handle.remove()
    return logits, seen[-1][:, -1]


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_the_heads_sums_in_fp32(kind):
    model = quantized(kind)
    logits, hidden = prefilled(model)
    assert logits.dtype == torch.float32
    assert hidden.dtype == torch.bfloat16
    exact = hidden.double() @ weight_of(model.get_output_embeddings()).double().T
    floor = 30 if kind == "int8-dynamic" else 60  # its inputs are quantized; bf16 sums would have about 50
    assert sqnr_db(exact, logits) > floor


def test_without_it_bf16_logits_tie():
    model = quantized("bf16")
    rounded = model(IDS).logits[:, -1]
    logits, _ = prefilled(model)
    assert rounded.dtype == torch.bfloat16
    assert len(rounded.unique()) < len(logits.unique()) == logits.numel()


@pytest.mark.skipif(native.find_compiler() is None, reason="no C++ compiler")
@pytest.mark.parametrize("kind", ["bf16", "fp16", "int8", "int4"])
def test_the_compiled_step_keeps_them_too(kind):
    model = quantized(kind)
    forward = Forward(model)
    row, logits = forward.prefill({"input_ids": IDS})
    token = logits.argmax(-1)
    other, _ = forward.prefill({"input_ids": IDS})
    assert forward.route == COMPILED
    with torch.inference_mode():
        compiled, modules = forward.step([row], token), forward._step_modules([other], token)
    assert compiled.dtype == modules.dtype == torch.float32
    assert not torch.equal(compiled, compiled.bfloat16().float())
    assert sqnr_db(modules, compiled) > 35


def test_a_model_in_fp32_is_as_it_was():
    model = quantized("fp32", "fp32")
    wanted = model(IDS, logits_to_keep=1).logits[:, -1]
    logits, _ = prefilled(model)
    assert torch.equal(logits, wanted)


def test_a_tied_head_keeps_its_tie_and_its_names():
    model = tiny_models.llama()
    model.lm_head.weight = model.model.embed_tokens.weight
    names = list(model.state_dict())
    keep_logits_(model)
    assert gives_logits(model.lm_head)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert list(model.state_dict()) == names


def test_a_head_that_is_replaced_later_gives_them_as_well():
    model = quantized("bf16")
    forward = Forward(model)
    model.lm_head = quantized("int8").lm_head
    assert not gives_logits(model.lm_head)
    _, logits = forward.prefill({"input_ids": IDS})
    assert logits.dtype == torch.float32
    assert gives_logits(model.lm_head)


@pytest.mark.parametrize("kind", ["bf16", "int8", "int4"])
def test_gradients_flow_through_such_a_head(kind):
    model = quantized(kind)
    keep_logits_(model)
    hidden = torch.randn(1, 3, model.config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
    model.lm_head(hidden).sum().backward()
    wanted = weight_of(model.lm_head).sum(0)
    assert sqnr_db(wanted.expand_as(hidden), hidden.grad.float()) > 40
