"""The same weights and codes with one thread and with two."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from labkit.models.pocket.modeling import SteadyWeightNorm, use_steady_weight_norm_
from labkit.quantization import get_scheme
from labkit.quantization.statistics import InputStatistics


@pytest.fixture
def with_threads():
    """(count, function) -> what it returns when torch has that many threads."""
    before = torch.get_num_threads()

    def run(count, function):
        torch.set_num_threads(count)
        return function()

    yield run
    torch.set_num_threads(before)


def position_convolution(dtype):
    """As large as that of the pocket model's speech encoder."""
    torch.manual_seed(0)
    return weight_norm(nn.Conv1d(256, 256, 32, groups=8), dim=2).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_speech_encoders_weight_does_not_depend_on_the_number_of_threads(with_threads, dtype):
    plain = position_convolution(dtype)
    steady = copy.deepcopy(plain)
    use_steady_weight_norm_(steady)
    assert type(steady.parametrizations.weight[0]) is SteadyWeightNorm
    assert steady.state_dict().keys() == plain.state_dict().keys()
    first, second = (with_threads(count, lambda: steady.weight.clone()) for count in (1, 2))
    assert torch.equal(first, second)
    torch.testing.assert_close(first, plain.weight)


def test_the_pocket_models_speech_encoder_uses_it():
    import tiny_models

    model, _ = tiny_models.pocket()
    kinds = {type(module).__name__ for module in model.modules() if "WeightNorm" in type(module).__name__}
    assert kinds <= {"SteadyWeightNorm"}


def test_gptqs_codes_do_not_depend_on_the_number_of_threads(with_threads):
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(128, 128, generator=generator) * torch.rand(128, generator=generator).pow(3)
    batches = [torch.randn(500, 128, generator=generator) @ mix for _ in range(3)]
    linear = nn.Linear(128, 64)
    linear.weight.data = torch.randn(64, 128, generator=generator) * 0.05

    def solved():
        statistics = InputStatistics(128, drifting=True)
        for batch in batches:
            statistics.add(batch, batch + 0.01 * batch.roll(1, 0))
        return get_scheme("gptq").quantize_linear(linear, statistics=statistics).state_dict()

    first, second = (with_threads(count, solved) for count in (1, 2))
    assert all(torch.equal(first[name], second[name]) for name in first)
