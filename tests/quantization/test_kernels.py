"""Every fast product against the reference path in higher precision, on random data."""

import gc
import weakref

import pytest
import torch

from labkit.quantization import affine, get_scheme
from labkit.quantization.affine import sqnr_db
from labkit.quantization.kernels import cpu_int4, cpu_nf4, int8
from labkit.quantization.native import library as native


def rows(count, columns, dtype=torch.bfloat16):
    return torch.randn(count, columns, generator=torch.Generator().manual_seed(count)).to(dtype)


def test_the_packed_products_of_torch_are_there():
    # torch is pinned: if these vanish with a new version, decoding becomes slower and somebody should know
    assert int8.has_packed_int8()
    assert cpu_int4.block_rows() in (32, 64)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 24, 25, 100])
@pytest.mark.parametrize("sizes", [(7, 32), (48, 64), (130, 256), (5, 10), (16, 24)])
def test_int8_product(count, sizes):
    weight = torch.randint(-127, 128, sizes, dtype=torch.int8)
    scale = torch.rand(sizes[0]).bfloat16()
    x = rows(count, sizes[1])
    exact = x.double() @ (weight.double() * scale.double()[:, None]).T
    assert sqnr_db(exact, int8.int8_multiply(x, weight, scale)) > 46
    assert sqnr_db(exact, int8.int8_multiply_reference(x, weight, scale)) > 46
    in_half = int8.int8_multiply(x.half(), weight, scale)
    assert sqnr_db(exact, in_half) > 55
    assert sqnr_db(exact, int8.int8_multiply(x.float(), weight, scale)) > 100


def test_int8_in_half_precision_does_not_overflow_where_the_result_fits():
    weight = torch.full((4, 4096), 127, dtype=torch.int8)
    y = int8.int8_multiply(torch.ones(2, 4096, dtype=torch.half), weight, torch.full((4,), 0.01).bfloat16())
    assert torch.isfinite(y).all()


@pytest.mark.parametrize("count", [1, 17, 64])
@pytest.mark.parametrize("sizes", [(7, 10), (48, 64), (64, 4096)])
def test_integer_product_is_exact(count, sizes):
    codes = torch.randint(-127, 128, (count, sizes[1]), dtype=torch.int8)
    weight = torch.randint(-127, 128, sizes, dtype=torch.int8)
    exact = codes.long() @ weight.long().T
    assert torch.equal(int8.integer_product(codes, weight).long(), exact)
    reference = int8.integer_product_reference(codes, weight)
    torch.testing.assert_close(reference.double(), exact.double(), rtol=1e-5, atol=16)


def test_integer_sums_do_not_saturate():
    codes = torch.full((40, 4096), 127, dtype=torch.int8)
    assert (int8.integer_product(codes, -codes[:16]) == -127 * 127 * 4096).all()


def test_token_scales_cover_each_row_and_survive_zeros():
    x = rows(4, 32, torch.float32)
    x[2] = 0
    codes, scale = int8.quantize_tokens(x)
    assert codes[2].abs().max() == 0
    assert (codes[[0, 1, 3]].abs().amax(1) == 127).all()
    assert ((codes * scale - x).abs() <= scale * 0.501).all()


@pytest.mark.parametrize("count", [1, 3, cpu_int4.PACKED_ROWS, cpu_int4.PACKED_ROWS + 1, 130])
@pytest.mark.parametrize("group_size", [32, 64, 128, 256])
def test_int4_products_agree_with_the_dequantized_weight(count, group_size):
    torch.manual_seed(0)
    module = get_scheme("int4", group_size=group_size).quantize_linear(torch.nn.Linear(512, 192, bias=False))
    if cpu_int4.block_rows():
        assert module.layout == f"blocks{cpu_int4.block_rows()}"
    for dtype, floor in ((torch.bfloat16, 45), (torch.float16, 60), (torch.float32, 110)):
        x = rows(count, 512, dtype)
        exact = x.double() @ module.dequantize(torch.float32).double().T
        with torch.inference_mode():
            assert sqnr_db(exact, module(x)) > floor


@pytest.mark.parametrize("block", [32, 64])
def test_int4_block_order_is_exactly_undone(block):
    packed = affine.pack(torch.randint(0, 16, (192, 96), dtype=torch.uint8), 4)
    blocks = cpu_int4.to_blocks(packed, block)
    assert not torch.equal(blocks, packed)
    assert torch.equal(cpu_int4.from_blocks(blocks, block), packed)


@pytest.mark.parametrize("block", [32, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_int4_weights_are_dequantized_from_the_kernels_order_to_the_last_bit(block, dtype):
    torch.manual_seed(0)
    module = get_scheme("int4", group_size=32).quantize_linear(torch.nn.Linear(160, 192, bias=False))
    blocks = cpu_int4.to_blocks(module.relayout(module.packed, module.layout, "plain"), block)
    exact = module.dequantize(dtype).T
    for dequantize in (cpu_int4.dequantize_turned, cpu_int4.dequantize_turned_reference):
        assert torch.equal(dequantize(blocks, module.scale_zero, 32, block, dtype), exact)
    part = slice(64, 128)
    got = cpu_int4.dequantize_turned(blocks[part], module.scale_zero[:, part], 32, block, dtype)
    assert torch.equal(got, exact[:, part])


def test_int4_products_of_many_rows_go_by_slices(monkeypatch):
    torch.manual_seed(0)
    module = get_scheme("int4").quantize_linear(torch.nn.Linear(256, 320, bias=False))
    x = rows(60, 256, torch.float32)
    whole = module(x)
    monkeypatch.setattr(cpu_int4, "SLICE_ELEMENTS_CPU", 256 * 128)
    torch.testing.assert_close(module(x), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sizes", [(48, 64), (64, 32)])
def test_int4_falls_back_where_the_kernel_cannot(sizes):
    out_features, in_features = sizes
    group_size = 64 if in_features == 64 else 16
    scheme = get_scheme("int4", group_size=group_size)
    module = scheme.quantize_linear(torch.nn.Linear(in_features, out_features))
    assert module.layout == "plain"
    x = rows(2, in_features)
    exact = x.double() @ module.dequantize(torch.float32).double().T + module.bias.double()
    with torch.inference_mode():
        assert sqnr_db(exact, module(x)) > 40


def test_nf4_block_order_is_exactly_undone():
    packed = torch.randint(0, 256, (96, 64), dtype=torch.uint8)
    assert torch.equal(cpu_nf4.from_blocks(cpu_nf4.to_blocks(packed)), packed)


@pytest.mark.parametrize("count", [1, cpu_nf4.PACKED_ROWS, cpu_nf4.PACKED_ROWS + 1, 200])
@pytest.mark.parametrize("options", [{}, {"double_quant": False}, {"group_size": 128}], ids=str)
def test_nf4_agrees_with_bitsandbytes_own_layer(count, options):
    import bitsandbytes

    torch.manual_seed(0)
    linear = torch.nn.Linear(256, 96, bias=False)
    module = get_scheme("nf4", **options).quantize_linear(linear)
    packed, state = bitsandbytes.functional.quantize_4bit(
        linear.weight.data,
        blocksize=options.get("group_size", 64),
        compress_statistics=options.get("double_quant", True),
        quant_type="nf4",
    )
    weight = bitsandbytes.functional.dequantize_4bit(packed, state)
    torch.testing.assert_close(module.dequantize(torch.float32), weight)
    for dtype in (torch.bfloat16, torch.float32):
        x = rows(count, 256, dtype)
        with torch.inference_mode():
            assert sqnr_db(x.double() @ weight.double().T, module(x)) > 44


def test_llm_int8_agrees_with_bitsandbytes_own_layer():
    import bitsandbytes

    torch.manual_seed(0)
    linear = torch.nn.Linear(256, 96)
    module = get_scheme("llm-int8").quantize_linear(linear)
    theirs = bitsandbytes.nn.Linear8bitLt(256, 96, has_fp16_weights=False, threshold=6.0)
    theirs.load_state_dict(linear.state_dict())
    theirs = theirs.to("cpu").eval()
    x = rows(20, 256, torch.float16) * 3
    with torch.inference_mode():
        assert sqnr_db(theirs(x), module(x)) > 50


def test_without_the_compiled_library_a_product_keeps_nothing_of_its_inputs(monkeypatch):
    """An error that is kept and raised again holds the frames of everyone who has asked, and their tensors."""
    native._library.cache_clear()
    monkeypatch.setenv(native.SWITCH, "0")
    try:
        module = get_scheme("int4", group_size=64).quantize_linear(
            torch.nn.Linear(128, 128), dtype=torch.bfloat16
        )
        inputs = [torch.ones(40, 128, dtype=torch.bfloat16) for _ in range(3)]
        references = [weakref.ref(tensor) for tensor in inputs]
        for tensor in inputs:
            module(tensor)
        del tensor, inputs
        gc.collect()
        assert [reference() for reference in references] == [None] * 3
        assert native.available() is None
    finally:
        native._library.cache_clear()
