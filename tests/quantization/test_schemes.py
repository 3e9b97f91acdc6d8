"""Every scheme stores what it says, multiplies what it stores, and takes any shape and dtype."""

import copy
import io

import pytest
import torch
from scheme_variants import QUANTIZED, VARIANTS, label, make, replaced
from torch import nn

from labkit.quantization import QuantizedLinear, SchemeError, get_scheme, known_schemes
from labkit.quantization.affine import sqnr_db
from labkit.quantization.statistics import InputStatistics

# decibels of the output against the unquantized layer, at least; standard normal weights and inputs
FLOOR = {
    "fp32": 100,
    "fp16": 55,
    "bf16": 45,
    "int8": 42,
    "int8-dynamic": 37,
    "int4": 21,
    "nf4": 19,
    "llm-int8": 37,
    "gptq": 21,
    "awq": 21,
    "hqq": 21,
}

# and no more than the dtype of the output can say
CEILING = {torch.float32: 200, torch.float16: 65, torch.bfloat16: 42}


@pytest.mark.parametrize("variant", VARIANTS, ids=label)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", [(128, 192), (256, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resident_bytes_are_the_predicted_ones(variant, bias, sizes, dtype):
    scheme = get_scheme(variant[0], **variant[1])
    module = replaced(scheme, make(*sizes, bias), dtype=dtype)
    predicted = scheme.predict_bytes(sizes[1], sizes[0], bias, dtype=dtype)
    held = [*module.parameters(), *module.buffers()]
    assert sum(t.untyped_storage().nbytes() for t in held) == predicted
    assert scheme.resident_bytes(module) == predicted
    with torch.inference_mode():
        module(torch.randn(3, sizes[0]))
        module(torch.randn(300, sizes[0], dtype=torch.bfloat16))
    assert scheme.resident_bytes(module) == predicted  # multiplying keeps no second copy


@pytest.mark.parametrize("variant", VARIANTS, ids=label)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_output_is_near_the_unquantized_one_in_the_input_dtype(variant, dtype):
    linear = make()
    module = replaced(get_scheme(variant[0], **variant[1]), linear)
    floor = {2: 6, 3: 14, 8: 42}.get(variant[1].get("num_bits"), FLOOR[variant[0]])
    for shape in [(128,), (1, 128), (5, 7, 128), (2, 200, 128)]:
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        with torch.inference_mode():
            y = module(x)
            expected = linear(x.float())
        assert y.dtype == dtype
        assert y.shape == expected.shape
        assert sqnr_db(expected, y) > min(floor, CEILING[dtype]) - 2


@pytest.mark.parametrize("variant", VARIANTS, ids=label)
def test_no_rows_give_no_rows(variant):
    module = replaced(get_scheme(variant[0], **variant[1]), make())
    for shape in [(0, 128), (2, 0, 128)]:
        assert module(torch.empty(shape)).shape == (*shape[:-1], 192)


@pytest.mark.parametrize("variant", QUANTIZED, ids=label)
def test_non_contiguous_inputs_give_the_same(variant):
    module = replaced(get_scheme(variant[0], **variant[1]), make())
    x = torch.randn(128, 6).bfloat16()
    with torch.inference_mode():
        torch.testing.assert_close(module(x.T), module(x.T.contiguous()))


@pytest.mark.parametrize("variant", VARIANTS, ids=label)
def test_state_dict_is_tensors_and_restores_the_same_outputs(variant):
    scheme = get_scheme(variant[0], **variant[1])
    module, other = replaced(scheme, make()), replaced(scheme, make(seed=9))
    state = module.state_dict()
    assert all(type(value) is torch.Tensor for value in state.values())
    assert sum(v.numel() * v.element_size() for v in state.values()) == scheme.resident_bytes(module)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    empty = scheme.empty_linear(128, 192, True, dtype=torch.float32)
    empty.load_state_dict(state)
    x = torch.randn(4, 128).bfloat16()
    with torch.inference_mode():
        assert torch.equal(module(x), other(x))
        assert torch.equal(module(x), empty(x))
        assert torch.equal(module(x), copy.deepcopy(module)(x))


@pytest.mark.parametrize(
    "variant", [v for v in QUANTIZED if v[0] not in ("int8", "int8-dynamic", "llm-int8")], ids=label
)
def test_moving_to_meta_and_dtype_changes_keep_the_weight_readable(variant):
    module = replaced(get_scheme(variant[0], **variant[1]), make())
    before = module.dequantize(torch.float32)
    assert torch.equal(module.to("cpu").dequantize(torch.float32), before)
    assert copy.deepcopy(module).to("meta").layout == "plain"


def test_order_of_quality_int8_int4_3_bits_2_bits():
    linear, x = make(512, 256), torch.randn(64, 512)

    def quality(name, **options):
        with torch.inference_mode():
            return sqnr_db(linear(x), get_scheme(name, **options).quantize_linear(linear)(x))

    int8, int4, bits3, bits2 = (
        quality("int8"),
        quality("int4"),
        quality("int4", num_bits=3),
        quality("int4", num_bits=2),
    )
    assert int8 > int4 + 18
    assert int4 > bits3 + 5
    assert bits3 > bits2 + 5
    assert int8 > quality("int8-dynamic") > int4 > quality("int4", group_size=512)


def test_llm_int8_keeps_outlier_columns_that_int8_dynamic_loses():
    linear, x = make(256, 128), torch.randn(32, 256)
    x[:, 7] *= 100
    with torch.inference_mode():
        expected = linear(x)
        kept = sqnr_db(
            expected - linear.weight[:, 7] * x[:, 7:8],
            (get_scheme("llm-int8").quantize_linear(linear)(x) - linear.weight[:, 7] * x[:, 7:8]),
        )
        lost = sqnr_db(
            expected - linear.weight[:, 7] * x[:, 7:8],
            (get_scheme("int8-dynamic").quantize_linear(linear)(x) - linear.weight[:, 7] * x[:, 7:8]),
        )
    assert kept > lost + 10


def test_smoothing_keeps_what_large_input_channels_would_drown():
    linear = make(256, 128)
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(2))
    x[:, [7, 100]] *= 60
    statistics = InputStatistics(256, full=False)
    statistics.add(x)

    def quality(**options):
        module = get_scheme("int8-dynamic", **options).quantize_linear(linear, statistics=statistics)
        with torch.inference_mode():
            assert sqnr_db(x @ linear.weight.T, x @ module.dequantize(torch.float32).T) > 30
            return sqnr_db(linear(x), module(x))

    half, whole = quality(smoothing="rms"), quality(smoothing="rms", smoothing_strength=1.0)
    assert half > quality() + 4
    assert half > whole + 2  # which leaves the weight's columns as unlike as the channels were
    plain, smooth = get_scheme("int8-dynamic"), get_scheme("int8-dynamic", smoothing="rms")
    assert smooth.predict_bytes(128, 256, True) == plain.predict_bytes(128, 256, True) + 2 * 256


def test_smoothing_asks_for_calibration_and_no_smoothing_does_not():
    assert not get_scheme("int8-dynamic").requires_calibration
    scheme = get_scheme("int8-dynamic", smoothing="rms")
    assert scheme.requires_calibration
    with pytest.raises(SchemeError, match="int8-dynamic needs calibration"):
        scheme.quantize_linear(make())
    silent = InputStatistics(128, full=False)
    silent.add(torch.zeros(4, 128))
    assert torch.isfinite(scheme.quantize_linear(make(), statistics=silent).dequantize()).all()


def test_int4_zero_points_and_scales_can_be_read_back():
    from labkit.quantization import affine

    linear = make()
    module = get_scheme("int4").quantize_linear(linear)
    scale, zero_point = affine.choose_qparams(linear.weight.detach(), 4, 64, scale_dtype=torch.bfloat16)
    assert torch.equal(module.zero_point, zero_point)
    assert torch.equal(module.scale, scale)
    assert torch.equal(module.codes, affine.quantize(linear.weight.detach(), scale, zero_point, 4))


@pytest.mark.parametrize("variant", QUANTIZED, ids=label)
def test_gradients_reach_the_input_through_the_stored_weight(variant):
    module = replaced(get_scheme(variant[0], **variant[1]), make())
    x = torch.randn(3, 128, requires_grad=True)
    module(x).sum().backward()
    torch.testing.assert_close(x.grad, module.weight.sum(0).expand(3, 128))


def test_wrong_options_and_names_are_named():
    with pytest.raises(SchemeError, match=r"unknown scheme 'int5'; known are fp32, .*llm-int8"):
        get_scheme("int5")
    with pytest.raises(
        SchemeError, match=r"unknown option 'groupsize' of scheme int4; known are num_bits, group_size"
    ):
        get_scheme("int4", groupsize=64)
    with pytest.raises(SchemeError, match="num_bits of scheme int4 must be one of 2, 3, 4, 8, not 5"):
        get_scheme("int4", num_bits=5)
    with pytest.raises(SchemeError, match="group_size of scheme int4 must be int"):
        get_scheme("int4", group_size="64")
    with pytest.raises(SchemeError, match="must be positive"):
        get_scheme("int4", group_size=0)
    with pytest.raises(SchemeError, match="unknown option 'num_bits' of scheme int8; it has none"):
        get_scheme("int8", num_bits=8)


def test_sizes_that_do_not_fit_say_what_would():
    with pytest.raises(SchemeError, match=r"group_size 64 does not divide 96 input features; 32 would do"):
        get_scheme("int4").quantize_linear(make(96))
    with pytest.raises(SchemeError, match="take int8"):
        get_scheme("nf4").validate(10, 10)
    with pytest.raises(SchemeError, match="packed by 8"):
        get_scheme("int4", num_bits=3, group_size=4).validate(12, 8)
    with pytest.raises(SchemeError, match="runs on cpu and cuda, not on mps"):
        get_scheme("int8").validate(64, 64, "mps")


def test_weights_that_are_not_finite_or_not_there_are_refused():
    linear = make()
    linear.weight.data[3, 4] = float("nan")
    with pytest.raises(SchemeError, match="not finite"):
        get_scheme("int4").quantize_linear(linear)
    with pytest.raises(SchemeError, match="meta device"):
        get_scheme("int8").quantize_linear(nn.Linear(64, 64, device="meta"))


def test_every_option_has_help_and_every_scheme_a_summary():
    from dataclasses import fields

    assert set(known_schemes()) == set(FLOOR)
    for cls in known_schemes().values():
        assert 20 < len(cls().summary) < 110
        for item in fields(cls):
            assert item.metadata["help"]


def test_wrong_width_is_an_error_that_gives_both_widths():
    module = get_scheme("int8").quantize_linear(make())
    assert isinstance(module, QuantizedLinear)
    with pytest.raises(ValueError, match="last dimension is 64, the layer takes 128"):
        module(torch.randn(2, 64))
