"""Triton's kernels against the reference path in higher precision: on a GPU, or on the CPU by TRITON_INTERPRET=1."""

import pytest
import torch

from labkit.quantization.affine import sqnr_db
from labkit.quantization.int4 import Int4Linear
from labkit.quantization.int8 import Int8Linear
from labkit.quantization.kernels import cuda_products as cuda
from labkit.quantization.kernels.cuda_products import Packed, Tiles

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = [
    pytest.mark.gpu(interpreted=True),
    pytest.mark.skipif(not cuda.available(DEVICE), reason="needs triton, and a GPU or TRITON_INTERPRET=1"),
]


def same(want: torch.Tensor, got: torch.Tensor) -> bool:
    """Equal to the last bit; the interpreter cuts bf16 off where a GPU rounds."""
    return torch.equal(want, got) if DEVICE.type == "cuda" else sqnr_db(want, got) > 42


def make(kind: str, out_features: int, in_features: int) -> tuple[Packed, torch.Tensor]:
    """A random weight and its value in double precision."""
    generator = torch.Generator().manual_seed(out_features + in_features)
    weight = torch.randn(out_features, in_features, generator=generator) + 0.3
    if kind == "bf16":
        weight = weight.to(DEVICE, torch.bfloat16)
        return Packed(weight), weight.double()
    if kind == "int8":
        module = Int8Linear(in_features, out_features, False)
        module.set_weight(weight)
        module.to(DEVICE)
        return Packed(module.weight_int8, module.scale), module.dequantize(torch.float64)
    module = Int4Linear(in_features, out_features, False, 4, int(kind.removeprefix("int4-g")))
    module._set_layout("plain")
    module.set_weight(weight)
    module._set_layout("plain")
    packed = Packed(module.packed.to(DEVICE), module.scale_zero.to(DEVICE), module.group_size)
    scale, zero = module.scale_zero.double().unbind(-1)
    codes = module.codes.double().unflatten(1, (-1, module.group_size))
    exact = (codes - 8) * scale.T[..., None] + zero.T[..., None]
    return packed, exact.flatten(1).to(DEVICE)


def rows(count: int, columns: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, columns, generator=generator).to(DEVICE, torch.bfloat16)


KINDS = ["bf16", "int8", "int4-g64", "int4-g128", "int4-g32"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("count", "splits"), [(1, 1), (3, 4), (8, 2), (11, 1), (30, 3)])
@pytest.mark.parametrize("sizes", [(96, 256), (40, 768)])
def test_product(kind, count, splits, sizes):
    packed, weight = make(kind, *sizes)
    x = rows(count, sizes[1])
    got = cuda.product(x, packed, Tiles(32, packed.steps[0], splits, stages=3))
    assert sqnr_db(x.double() @ weight.T, got) > 45  # what is lost is the rounding of the answer to bf16


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_does_not_depend_on_its_company(kind):
    packed, _ = make(kind, 96, 256)
    x = rows(8, 256)
    tiles = Tiles(32, packed.steps[0], 2)
    together = cuda.product(x, packed, tiles)
    for index in range(8):
        assert torch.equal(cuda.product(x[index : index + 1], packed, tiles)[0], together[index])


@pytest.mark.parametrize("kind", KINDS)
def test_bias_and_gate_are_those_of_modules(kind):
    packed, weight = make(kind, 128, 256)
    x, bias = rows(2, 256), rows(1, 128)[0]
    tiles = Tiles(32, packed.steps[-1])
    plain = cuda.product(x, packed, tiles)
    assert same(plain + bias, cuda.product(x, packed, tiles, bias=bias))
    gate, up = plain.chunk(2, -1)
    want = up * torch.nn.functional.silu(gate)
    got = cuda.product(x, packed, tiles, gated=True)
    exact = (x.double() @ weight.T).chunk(2, -1)
    exact = exact[1] * torch.nn.functional.silu(exact[0])
    assert sqnr_db(exact, got) > 37
    assert sqnr_db(want, got) > 37
    assert sqnr_db(got, cuda.product(x, packed, Tiles(32, packed.steps[-1], 2), gated=True)) > 37
    with pytest.raises(ValueError, match="one split"):
        cuda.product(x, packed, Tiles(32, packed.steps[-1], 2), bias=bias)


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("part", [slice(None), slice(17, 90)])
def test_dequantizing_is_that_of_the_reference(kind, part):
    packed, weight = make(kind, 96, 192 if kind != "int4-g128" else 256)
    assert torch.equal(cuda.dequantize(packed, torch.float32, part).double(), weight[part])
    assert same(weight[part].to(torch.bfloat16), cuda.dequantize(packed, torch.bfloat16, part))


def test_weights_that_no_tile_divides_are_refused():
    assert not cuda.takes(Packed(torch.zeros(8, 40, dtype=torch.bfloat16, device=DEVICE)))
    nibbles = torch.zeros(8, 48, dtype=torch.uint8, device=DEVICE)
    assert not cuda.takes(Packed(nibbles, torch.zeros(6, 8, 2, dtype=torch.bfloat16, device=DEVICE), 16))
