"""The column solve: what it computes, that it is the textbook's, and that each step around it helps."""

import contextlib
import types

import pytest
import torch
from torch import nn

from labkit.quantization import SchemeError, affine, get_scheme, gptq_blocks
from labkit.quantization.gptq import correct_drift, prepare_columns, refine, solve, trace_error
from labkit.quantization.statistics import InputStatistics


def problem(rows=8, columns=6, samples=40, seed=0):
    """A weight and correlated inputs of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    mix = torch.randn(columns, columns, generator=generator) * torch.logspace(0, -1.5, columns)
    return weight, torch.randn(samples, columns, generator=generator) @ mix


def moment_of(inputs):
    return inputs.T @ inputs / len(inputs)


def statistics_of(inputs, reference=None):
    statistics = InputStatistics(inputs.shape[-1], drifting=reference is not None)
    statistics.add(inputs, reference)
    return statistics


def grid(weight, num_bits=3, group_size=3):
    return affine.choose_qparams(weight, num_bits, group_size, scale_dtype=torch.bfloat16)


def value(codes, scale, zero_point, num_bits=3):
    zero = affine.stored_zero(scale, zero_point, num_bits)
    groups = codes.float().unflatten(1, (scale.shape[1], -1))
    return affine.value_of_codes(groups, scale[..., None].float(), zero[..., None].float(), num_bits).flatten(
        1
    )


def test_the_factor_is_that_of_the_inverse_in_the_order_of_falling_activation():
    _, inputs = problem()
    moment = moment_of(inputs)
    columns = prepare_columns(moment, 0.01)
    assert torch.equal(columns.order, moment.diagonal().argsort(descending=True))
    assert torch.equal(columns.factor, columns.factor.triu())
    damped = moment + 0.01 * moment.diagonal().mean() * torch.eye(6)
    inverse = damped[columns.order][:, columns.order].inverse()
    torch.testing.assert_close(columns.factor.T @ columns.factor, inverse, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(columns.importance, 1 / damped.inverse().diagonal(), rtol=1e-3, atol=1e-5)
    assert torch.equal(prepare_columns(moment, 0.01, act_order=False).order, torch.arange(6))


@pytest.mark.parametrize("act_order", [True, False])
def test_the_solve_is_the_textbooks_one_column_at_a_time(act_order):
    weight, inputs = problem()
    columns = prepare_columns(moment_of(inputs), 0.01, act_order)
    scale, zero_point = grid(weight)
    solution = solve(weight, columns, scale, zero_point, 3)

    left, inverse = weight.double().clone(), columns.moment.double().inverse()
    zero = affine.stored_zero(scale, zero_point, 3)
    codes = torch.zeros(8, 6)
    remaining = list(range(6))
    for step, column in enumerate(
        columns.order.tolist()
    ):  # optimal brain surgery, the inverse shrunk each time
        group = column // 3
        codes[:, column] = affine.round_to_codes(
            left[:, column], scale[:, group].double(), zero[:, group].double(), 3
        )
        given = affine.value_of_codes(
            codes[:, column].double(), scale[:, group].double(), zero[:, group].double(), 3
        )
        error = (left[:, column] - given) / inverse[0, 0]
        remaining = columns.order[step:].tolist()
        left[:, remaining] -= error[:, None] * inverse[0]
        inverse = (inverse - inverse[:, :1] * inverse[:1] / inverse[0, 0])[1:, 1:]
    assert torch.equal(solution.codes.float(), codes)


@pytest.mark.parametrize("size", [1, 2, 5, 128])
def test_the_block_size_changes_no_code(size):
    weight, inputs = problem(16, 24)
    columns = prepare_columns(moment_of(inputs))
    options = (*grid(weight), 3)
    whole = solve(weight, columns, *options)
    assert torch.equal(solve(weight, columns, *options, column_block_size=size).codes, whole.codes)
    assert torch.equal(
        refine(weight, columns, whole, *options, column_block_size=size),
        refine(weight, columns, whole, *options),
    )


def test_the_columns_errors_add_up_to_the_trace():
    weight, inputs = problem(16, 24)
    columns = prepare_columns(moment_of(inputs))
    scale, zero_point = grid(weight)
    solution = solve(weight, columns, scale, zero_point, 3)
    change = (weight - value(solution.codes, scale, zero_point))[:, columns.order]
    expected = ((change @ columns.moment) * change).sum()
    torch.testing.assert_close(solution.column_errors.sum(), expected, rtol=1e-3, atol=0)
    assert torch.equal(solution.steps[columns.order], torch.arange(24))


def test_each_step_lowers_the_error_of_the_output():
    weight, inputs = problem(64, 64, 500)
    inputs = inputs.flip(1)  # the largest activations in the last columns
    moment = moment_of(inputs)
    scale, zero_point = grid(weight, group_size=16)

    def error(codes):
        return trace_error(weight, value(codes, scale, zero_point), moment)

    nearest = affine.quantize(weight, scale, zero_point, 3)
    found = {}
    for act_order in (False, True):
        columns = prepare_columns(moment, act_order=act_order)
        found[act_order] = solve(weight, columns, scale, zero_point, 3)
    refined = refine(weight, columns, found[True], scale, zero_point, 3, sweeps=2)
    more = refine(weight, columns, found[True], scale, zero_point, 3, sweeps=8)
    assert error(found[False].codes) < 0.9 * error(nearest)
    assert error(found[True].codes) < 0.6 * error(found[False].codes)
    assert error(more) <= error(refined) < error(found[True].codes)


def test_a_drifted_input_gets_the_answer_of_the_original_one():
    weight, inputs = problem(16, 24, 400)
    original = inputs @ (
        torch.eye(24) + 0.1 * torch.randn(24, 24, generator=torch.Generator().manual_seed(3))
    )
    statistics = statistics_of(inputs, original)
    columns = prepare_columns(statistics.second_moment, 1e-6)
    moved = correct_drift(weight, columns, statistics.drift)
    torch.testing.assert_close(inputs @ moved.T, original @ weight.T, rtol=2e-2, atol=2e-2)
    halfway = correct_drift(weight, columns, statistics.drift, 0.5)
    torch.testing.assert_close(halfway, (weight + moved) / 2)


def test_the_scheme_takes_drift_into_account():
    weight, inputs = problem(32, 64, 1000)
    linear = nn.Linear(64, 32, bias=False)
    linear.weight.data = weight
    original = inputs + 0.3 * inputs.roll(1, 1)

    def error(share):
        statistics = statistics_of(inputs, original)
        scheme = get_scheme("gptq", num_bits=8, group_size=32, drift_correction=share)
        module = scheme.quantize_linear(linear, statistics=statistics)
        return (module(inputs) - original @ weight.T).square().mean()

    assert error(1.0) < 0.2 * error(0.5) < 0.2 * error(0.0)


@pytest.mark.parametrize("num_bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_it_stores_what_int4_stores_with_less_error(num_bits, symmetric):
    weight, inputs = problem(48, 128, 600)
    linear = nn.Linear(128, 48)
    linear.weight.data = weight
    options = {"num_bits": num_bits, "group_size": 32, "symmetric": symmetric}
    nearest = get_scheme("int4", **options).quantize_linear(linear)
    scheme = get_scheme("gptq", **options)
    solved = scheme.quantize_linear(linear, statistics=statistics_of(inputs))
    assert type(solved) is type(nearest)
    assert {k: (v.shape, v.dtype) for k, v in solved.state_dict().items()} == {
        k: (v.shape, v.dtype) for k, v in nearest.state_dict().items()
    }
    assert scheme.predict_bytes(48, 128, True) == get_scheme("int4", **options).predict_bytes(48, 128, True)
    assert solved.has_integer_zero_points
    if symmetric:
        assert (solved.codes >= 1).all()
        assert (solved.zero_point == 2 ** (num_bits - 1)).all()
    moment = moment_of(inputs)
    errors = [trace_error(weight, module.dequantize(torch.float32), moment) for module in (nearest, solved)]
    assert errors[1] < 0.8 * errors[0]


def test_columns_that_no_input_reaches_and_repeated_ones_are_no_trouble():
    weight, inputs = problem(16, 64, 30)
    inputs[:, 5] = 0
    inputs[:, 7] = inputs[:, 8]
    linear = nn.Linear(64, 16, bias=False)
    linear.weight.data = weight
    module = get_scheme("gptq", group_size=32).quantize_linear(linear, statistics=statistics_of(inputs))
    assert torch.isfinite(module.dequantize()).all()
    step = module.scale.float().repeat_interleave(32, 1)
    assert ((module.dequantize(torch.float32) - weight).abs()[:, 5] <= 1.01 * step[:, 5]).all()
    nothing = get_scheme("gptq", group_size=32).quantize_linear(linear, statistics=statistics_of(0 * inputs))
    assert torch.isfinite(nothing.dequantize()).all()


def test_too_little_dampening_is_raised_until_it_is_enough():
    inputs = torch.randn(2, 64).repeat(3, 1)
    moment = moment_of(inputs) * 1e-12
    columns = prepare_columns(moment, 1e-30)
    assert columns.dampening > 1e-30 * float(moment.diagonal().mean())
    assert torch.isfinite(columns.factor).all()
    with pytest.raises(SchemeError, match="no Cholesky factor even with dampening_frac 100000"):
        prepare_columns(-torch.eye(4) + 2e9 * torch.ones(4, 4).triu(3), 0.01)


def test_missing_and_broken_calibration_is_named():
    linear = nn.Linear(64, 16)
    scheme = get_scheme("gptq")
    with pytest.raises(SchemeError, match="gptq needs calibration"):
        scheme.quantize_linear(linear)
    with pytest.raises(SchemeError, match="no calibration input was seen"):
        scheme.quantize_linear(linear, statistics=InputStatistics(64))
    with pytest.raises(SchemeError, match="inputs hold values that are not finite"):
        scheme.quantize_linear(linear, statistics=statistics_of(torch.full((3, 64), torch.inf)))


def test_second_moments_are_those_of_all_rows_in_any_dtype():
    _, inputs = problem(8, 16, 60)
    statistics = InputStatistics(16)
    for part in inputs.bfloat16().view(3, 20, 16):
        statistics.add(part.view(4, 5, 16))
    statistics.add(torch.empty(0, 16))
    rows = inputs.bfloat16().double()
    torch.testing.assert_close(statistics.second_moment.double(), rows.T @ rows / 60, rtol=1e-5, atol=1e-5)
    diagonal = InputStatistics(16, full=False)
    diagonal.add(inputs.bfloat16())
    torch.testing.assert_close(diagonal.mean_square, statistics.mean_square)
    assert statistics.rows == 60


class PlayedBack:
    """Stands in for ``torch.cuda``: what is called while it records is called again when it plays."""

    def __init__(self):
        self.recorded = []
        self.Stream = lambda: types.SimpleNamespace(wait_stream=lambda other: None)
        self.current_stream = self.Stream
        self.CUDAGraph = lambda: types.SimpleNamespace(replay=lambda: [one() for one in self.recorded])

    def device(self, _):
        return contextlib.nullcontext()

    stream = device

    def graph(self, _, capture_error_mode):
        assert capture_error_mode == "thread_local"
        return contextlib.nullcontext()


def test_a_recorded_block_works_on_tensors_of_its_own_and_gives_back_what_changed(monkeypatch):
    def block(changed, given, factor):
        cuda.recorded.append(lambda: changed.add_(factor * given))

    monkeypatch.setattr(torch, "cuda", cuda := PlayedBack())
    graph = gptq_blocks._Graph(block, (torch.zeros(3), torch.ones(3)), (2.0,))
    del cuda.recorded[:-1]  # of the run before recording
    for start in (1.0, 5.0):
        changed, given = torch.full((6,), start)[::2], torch.arange(3.0)
        graph.play((changed, given), 1)
        assert changed.tolist() == [start, start + 2, start + 4]
        assert given.tolist() == [0.0, 1.0, 2.0]


@pytest.mark.gpu
@pytest.mark.parametrize(("num_bits", "symmetric"), [(4, False), (3, True)])
def test_codes_found_on_a_gpu_are_as_good_and_nearly_all_the_same(num_bits, symmetric):
    """Blocks of 32 of 80 columns, so that the last is a smaller one; two weights, so that graphs are played again."""
    for seed in (0, 1):
        weight, inputs = problem(64, 80, 400, seed)
        scale, zero_point = affine.choose_qparams(weight, num_bits, 16, symmetric, torch.bfloat16)
        codes = {}
        for device in ("cpu", "cuda"):
            here = [one.to(device) for one in (weight, scale, zero_point)]
            columns = prepare_columns(moment_of(inputs).to(device))
            options = (here[1], here[2], num_bits, symmetric, 32)
            solution = solve(here[0], columns, *options)
            codes[device] = refine(here[0], columns, solution, *options, sweeps=2).cpu()
        assert (codes["cpu"] == codes["cuda"]).float().mean() > 0.98
        costs = [
            trace_error(weight, value(one, scale, zero_point, num_bits), moment_of(inputs))
            for one in codes.values()
        ]
        assert costs[1] == pytest.approx(costs[0], rel=0.02)
    assert gptq_blocks._graphs
    gptq_blocks.forget_graphs()
    assert not gptq_blocks._graphs


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_moments_on_a_gpu_are_summed_exactly(dtype):
    inputs = torch.randn(3, 50, 24).to(dtype)
    here, there = (InputStatistics(24, drifting=True, device=device) for device in ("cpu", "cuda"))
    for batch in inputs:
        here.add(batch, batch * 1.5)
        there.add(batch.cuda(), (batch * 1.5).cuda())
    torch.testing.assert_close(there.second_moment.cpu(), here.second_moment, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(there.drift.cpu(), here.drift, rtol=1e-5, atol=1e-5)
