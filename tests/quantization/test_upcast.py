"""Products of fp16 and bf16 on a CPU without instructions for them: the values of fp32 sums, rounded once."""

import pytest
import torch
from torch import nn

from labkit.quantization.kernels import upcast as module
from labkit.quantization.kernels.upcast import LEAST_ROWS, upcast

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cpu_without_instructions(monkeypatch):
    monkeypatch.setattr(module, "is_emulated", lambda dtype: dtype in module.HALVES)


@pytest.mark.parametrize("dtype", module.HALVES)
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_returns_the_fp32_sums_rounded_once(dtype, bias):
    linear = nn.Linear(96, 40, bias).to(dtype)
    x = torch.randn(2, LEAST_ROWS, 96).to(dtype)
    exact = nn.functional.linear(x.float(), linear.weight.float(), linear.bias.float() if bias else None)
    with upcast(CPU), torch.no_grad():
        assert torch.equal(linear(x), exact.to(dtype))


def test_a_large_weight_is_widened_a_slice_at_a_time_with_the_same_result(monkeypatch):
    linear = nn.Linear(64, 100).bfloat16().requires_grad_(False)
    x = torch.randn(LEAST_ROWS, 64).bfloat16()
    with upcast(CPU):
        whole = linear(x)
        monkeypatch.setattr(module, "row_slices", lambda *_, **__: [slice(0, 64), slice(64, 100)])
        assert torch.equal(linear(x), whole)


@pytest.mark.parametrize("dtype", module.HALVES)
def test_convolutions_and_matrix_products_are_those_of_fp32(dtype, monkeypatch):
    widened = []
    for function, compute in module.PRODUCTS.items():
        monkeypatch.setitem(
            module.PRODUCTS, function, lambda *args, call=compute: widened.append(call) or call(*args)
        )
    wave, kernel = torch.randn(1, 3, 200).to(dtype), nn.Conv1d(3, 8, 5, stride=2, groups=1).to(dtype)
    picture, window = torch.randn(1, 3, 20, 20).to(dtype), nn.Conv2d(3, 8, 3, padding=1).to(dtype)
    a, b = torch.randn(LEAST_ROWS, 32).to(dtype), torch.randn(24, 32).to(dtype)
    with torch.no_grad():
        exact = (
            nn.functional.conv1d(wave.float(), kernel.weight.float(), kernel.bias.float(), 2),
            nn.functional.conv2d(picture.float(), window.weight.float(), window.bias.float(), 1, 1),
            a.float() @ b.float().T,
        )
        with upcast(CPU):
            products = (kernel(wave), window(picture), a @ b.T)
    assert len(widened) == 3
    for product, values in zip(products, exact):
        assert torch.equal(product, values.to(dtype))


def test_few_rows_and_other_types_are_left_to_torch(monkeypatch):
    monkeypatch.setattr(module, "PRODUCTS", dict.fromkeys(module.PRODUCTS, lambda *_: pytest.fail("widened")))
    half, single = nn.Linear(32, 8).bfloat16(), nn.Linear(32, 8)
    with upcast(CPU):
        half(torch.randn(LEAST_ROWS - 1, 32).bfloat16())
        single(torch.randn(LEAST_ROWS, 32))


def test_gradients_reach_the_input_and_the_weight():
    linear = nn.Linear(32, 8).bfloat16()
    x = torch.randn(LEAST_ROWS, 32).bfloat16().requires_grad_()
    with upcast(CPU):
        linear(x).float().sum().backward()
    assert x.grad.dtype == torch.bfloat16
    assert torch.equal(x.grad[0], linear.weight.detach().float().sum(0).bfloat16())
    assert linear.weight.grad is not None


def test_nothing_changes_outside_and_on_a_cpu_with_instructions(monkeypatch):
    monkeypatch.setattr(module, "is_emulated", lambda dtype: False)
    monkeypatch.setattr(module, "PRODUCTS", dict.fromkeys(module.PRODUCTS, lambda *_: pytest.fail("widened")))
    with upcast(CPU):
        nn.Linear(32, 8).bfloat16()(torch.randn(LEAST_ROWS, 32).bfloat16())
