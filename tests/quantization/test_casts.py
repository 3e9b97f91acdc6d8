"""A quantized Linear gives the same answers after its model is cast, and NaN where its input is NaN."""

import copy
import itertools
from functools import cache

import pytest
import torch
from scheme_variants import QUANTIZED, label, make, replaced
from torch import nn

from labkit.quantization import get_scheme
from labkit.quantization.affine import sqnr_db
from labkit.quantization.int8_storage import StoredInt8

CASTS = {
    "bfloat16": lambda module: module.bfloat16(),
    "half": lambda module: module.half(),
    "float": lambda module: module.float(),
    "double": lambda module: module.double(),
    "to": lambda module: module.to(torch.float16),
    "to-device-and-dtype": lambda module: module.to("cpu", torch.bfloat16),
    "half-and-back": lambda module: module.half().float(),
    "type": lambda module: module.type(torch.bfloat16),
    "deepcopy-and-half": lambda module: copy.deepcopy(module).half(),
}
BIAS_DB = 42  # the bias alone is rounded, to bf16 at the coarsest


@cache
def _quantized(name):
    scheme = next(get_scheme(*variant[:1], **variant[1]) for variant in QUANTIZED if label(variant) == name)
    return scheme, replaced(scheme, make())


def quantized(variant):
    """The scheme and a module of its own; solved once."""
    scheme, module = _quantized(label(variant))
    return scheme, copy.deepcopy(module)


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("variant", QUANTIZED, ids=label)
def test_a_cast_leaves_the_stored_weight_and_its_answers_as_they_are(variant, cast):
    _, module = quantized(variant)
    x = torch.randn(5, 128, generator=torch.manual_seed(1))
    before, weight = module(x), module.dequantize(torch.float32)
    dtypes = {name: buffer.dtype for name, buffer in module.named_buffers()}
    module = CASTS[cast](module)
    assert {name: buffer.dtype for name, buffer in module.named_buffers()} == dtypes
    assert module.dtype == module.bias.dtype == module.weight.dtype
    assert torch.equal(module.dequantize(torch.float32), weight)
    assert sqnr_db(before, module(x)) > BIAS_DB


@pytest.mark.parametrize("variant", QUANTIZED, ids=label)
def test_weights_of_any_size_survive_a_cast_to_fp16(variant):
    """Scales of 1e-9 and of 1e9 have no value in fp16."""
    for size in (1e-9, 1e9) if variant[0] != "llm-int8" else (1e-3,):  # bitsandbytes quantizes it from fp16
        linear = make(bias=False)
        linear.weight.data.mul_(size)
        module = replaced(get_scheme(variant[0], **variant[1]), linear)
        x = torch.randn(3, 128, generator=torch.manual_seed(1))
        assert torch.equal(module(x), module.half()(x))


@pytest.mark.parametrize("variant", QUANTIZED, ids=label)
def test_a_state_dict_restores_into_a_cast_module_and_a_cast_one_is_refused(variant):
    scheme, module = quantized(variant)
    other = scheme.empty_linear(128, 192, True, dtype=torch.float32).half().float()
    x = torch.randn(3, 128, generator=torch.manual_seed(1))
    other.load_state_dict(module.state_dict())
    assert torch.equal(module(x), other(x))
    other.load_state_dict(copy.deepcopy(module).half().state_dict(), assign=True)
    assert sqnr_db(module(x), other(x)) > BIAS_DB
    spoiled = {
        name: tensor.half() if tensor.is_floating_point() else tensor
        for name, tensor in module.state_dict().items()
    }
    for assign in (False, True):
        with pytest.raises(RuntimeError, match=r"is torch\.float16, not .*quantized module cannot be cast"):
            other.load_state_dict(spoiled, assign=assign)
    assert torch.equal(module.dequantize(), other.dequantize(module.dtype))


@pytest.mark.parametrize("kind", ["embedding", "conv"])
def test_stored_embeddings_and_convolutions_follow_a_cast(kind):
    torch.manual_seed(0)
    module = nn.Embedding(40, 64) if kind == "embedding" else nn.Conv1d(8, 16, 3)
    module.weight.data.mul_(1e-5)  # its scales have two significant bits in fp16
    stored = get_scheme("int8").quantize_module(module)
    x = torch.arange(40) if kind == "embedding" else torch.randn(2, 8, 20)
    before = stored.weight
    assert isinstance(stored, StoredInt8)
    stored = stored.half()
    assert stored.scale.dtype == torch.bfloat16
    assert stored.weight.dtype == torch.float16
    assert stored(x if kind == "embedding" else x.half()).dtype == torch.float16
    assert torch.equal(stored.float().weight, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", QUANTIZED, ids=label)
def test_a_row_with_nan_or_inf_gives_no_numbers_and_leaves_other_rows_alone(variant, dtype):
    _, module = quantized(variant)
    cases = itertools.product((1, 5, 60), (float("nan"), float("inf"), -float("inf")))
    for (
        count,
        bad,
    ) in cases:  # few rows go through packed products, many are multiplied by the dequantized weight
        x = torch.randn(count, 128, generator=torch.manual_seed(1)).to(dtype)
        x[0, 3] = bad
        y = module(x)
        assert not torch.isfinite(y[0]).any()
        assert torch.isfinite(y[1:]).all()
