"""One Linear with its inputs: what notebooks show of it is what the schemes and the solve really do."""

from itertools import pairwise

import numpy as np
import pytest
import tiny_models
import torch

from labkit.common.errors import LabError
from labkit.engine.engine import Engine
from labkit.interactive.trial import Trial
from labkit.models.spec import ModelSpec
from labkit.quantization import affine, gptq
from labkit.quantization.gptq_steps import watch
from labkit.results.charts.layers import (
    bars,
    channel_sizes,
    correlation_map,
    curve,
    drawn_steps,
    solve_slider,
)

NAME = "model.language_model.layers.0.mlp.down_proj"


@pytest.fixture(scope="module")
def engine():
    model, processor = tiny_models.pocket()
    return Engine(model.float(), processor, spec=ModelSpec("tiny", "tiny"))


@pytest.fixture(scope="module")
def trial(engine):
    return Trial.of(engine, NAME, items=5)


def test_it_holds_what_the_linear_is_given(engine, trial):
    linear = engine.model.get_submodule(NAME)
    assert torch.equal(trial.weight, linear.weight.float())
    assert trial.weight.data_ptr() != linear.weight.data_ptr()
    assert 0 < len(trial.inputs) < trial.statistics.rows  # one item is held out, four calibrate
    assert trial.inputs.shape[1] == linear.in_features
    sizes = trial.channel_sizes()
    assert (sizes["largest"] >= sizes["typical"]).all()
    assert not linear._forward_pre_hooks


def test_what_is_not_there_is_told(engine):
    with pytest.raises(LabError, match=r"no Linear called model\.nothing; there are model\."):
        Trial.of(engine, "model.nothing")
    with pytest.raises(LabError, match=r"no Linear called model\.language_model; "):
        Trial.of(engine, "model.language_model")
    words = [{"input_ids": torch.arange(5, 12)[None]}]
    name = next(
        one for one, _ in engine.model.named_modules() if one.endswith("feature_projection.projection")
    )
    with pytest.raises(LabError, match="no calibration item comes to"):
        Trial.of(engine, name, batches=words)


def test_watching_the_solve_changes_nothing_about_it(trial):
    qparams = trial.qparams(3, 32)
    solution = gptq.solve(trial.weight, trial.columns, *qparams, 3)
    steps = list(watch(trial.weight[:9], trial.columns, *(one[:9] for one in qparams), 3))
    expected = affine.value_of_codes(
        solution.codes[:9].float().unflatten(1, (-1, 32)),
        qparams[0][:9].float()[..., None],
        affine.stored_zero(*qparams, 3)[:9].float()[..., None],
        3,
    ).flatten(1)
    different = (steps[-1].values - expected).abs() > 1e-5
    assert different.float().mean() < 0.01  # of a tie in rounding
    assert [one.column for one in steps] == trial.columns.order.tolist()
    for before, after in pairwise(steps[:6]):
        done = [one.column for one in steps[: before.number + 1]]
        assert torch.equal(before.values[:, done], after.values[:, done])  # rounded columns stay
        assert torch.allclose(after.error, before.values[:, after.column] - after.values[:, after.column])


def test_errors_of_the_steps_add_up_to_the_error_of_the_whole(trial):
    curves = trial.solve_errors(3, 32)
    scale, zero_point = trial.qparams(3, 32)
    codes = affine.quantize(trial.weight, scale, zero_point, 3)
    change = trial.weight - affine.dequantize(codes, scale, zero_point)
    inverse = torch.argsort(trial.columns.order)
    moment = trial.columns.moment[inverse][:, inverse]
    total = ((change @ moment) * change).sum().item()
    assert sum(curves["rounded to the nearest"]) == pytest.approx(total, rel=1e-3)
    nearest, plain, ordered = (sum(one) for one in curves.values())
    assert ordered < plain < nearest
    assert all(len(one) == trial.weight.shape[1] for one in curves.values())


def test_schemes_stand_in_the_order_they_should(trial):
    found = {
        one: trial.output_db(one) for one in ("int8", "int4-4bit:group_size=32", "gptq-4bit:group_size=32")
    }
    assert found["int8"] > found["gptq-4bit:group_size=32"] > found["int4-4bit:group_size=32"] > 10
    module = trial.quantized("int4-4bit:group_size=32")
    nearest = trial.output_error(module.dequantize(torch.float32))
    assert 10 ** (-found["int4-4bit:group_size=32"] / 10) == pytest.approx(nearest, rel=0.5)
    assert trial.output_error(trial.weight) == 0
    assert trial.outlier_share(0) == 1
    assert trial.outlier_share(1e9) == 0


def test_correlations_are_between_minus_one_and_one(trial):
    found = trial.correlation()
    assert found.shape == (min(trial.weight.shape[1], 160),) * 2
    assert np.allclose(np.diag(found), 1, atol=1e-3)
    assert abs(found).max() <= 1.001


def test_charts_of_a_layer_show_its_numbers(trial):
    sizes = channel_sizes(trial.channel_sizes(), threshold=6.0)
    drawn = list(sizes.data[0].y)
    assert drawn == sorted(drawn, reverse=True)
    assert len(sizes.layout.shapes) == 1
    assert list(bars({"int8": 40.0, "int4": 20.0}, "dB").data[0].y) == ["int8", "int4"]
    assert list(curve([1, 2], {"a": [3, 4]}, "x", "y").data[0].y) == [3, 4]
    assert correlation_map(trial.correlation()).data[0].zmin == -1
    steps = trial.watch(rows=4, group_size=32)
    chart = solve_slider(
        trial.weight[:4].numpy(), [one.values.numpy() for one in steps], [one.column for one in steps]
    )
    assert [one.visible for one in chart.data].count(True) == 1
    assert len(chart.layout.sliders[0].steps) == len(chart.data) == len(drawn_steps(len(steps)))
    last = (steps[-1].values - trial.weight[:4])[:, trial.columns.order]
    assert np.allclose(chart.data[-1].z, last.numpy())


def test_a_threshold_is_told_at_its_line_on_the_logarithmic_axis():
    chart = channel_sizes({"largest": [300.0, 1.0]}, threshold=6.0)
    [line], [label] = chart.layout.shapes, chart.layout.annotations
    assert (line.y0, line.y1) == (6.0, 6.0)
    assert label.y == pytest.approx(np.log10(6.0))
    assert label.text == "threshold 6"


@pytest.mark.parametrize("count", [1, 7, 40, 384, 13696])
def test_steps_that_are_drawn_are_few_and_hold_both_ends(count):
    found = drawn_steps(count)
    assert found[0] == 0
    assert found[-1] == count - 1
    assert len(found) == len(set(found)) <= 25
