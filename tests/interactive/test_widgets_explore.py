"""The explore widget shows what a scheme does, says what is refused, and leaves the model as it was."""

import numpy as np
import pytest
import torch

from labkit.common.errors import LabError
from labkit.interactive.widgets.explorer import ALL, Explore
from labkit.loading.calibration import calibration_batches
from labkit.loading.load import load
from labkit.measure import trial
from labkit.models import get_spec
from labkit.quantization import affine, get_scheme
from labkit.results.charts import weights

pytestmark = pytest.mark.skipif(
    get_spec("pocket").availability() != "here", reason="the pocket model is not in assets"
)


@pytest.fixture(scope="module")
def engine():
    return load("pocket", "fp32", device="cpu", progress=False)


@pytest.fixture(scope="module")
def explore(engine):
    return Explore(engine, part="lm_head", items=3)


def test_a_result_is_what_the_scheme_computes(engine):
    result = trial.try_scheme(engine.model.lm_head, get_scheme("int8"))
    weight = engine.model.lm_head.weight
    scale, zero_point = affine.choose_qparams(weight, 8, None, True, torch.bfloat16)
    codes = affine.quantize(weight, scale, zero_point, 8, symmetric=True)
    assert torch.equal(result.after, affine.dequantize(codes, scale, zero_point))
    assert result.bytes_before == 4 * weight.numel()
    assert result.bits == pytest.approx(8 + 32 / weight.shape[1], abs=0.1)
    better, worse = result.sqnr_db, trial.try_scheme(engine.model.lm_head, "int4").sqnr_db
    assert better > worse + 15


def test_calibrated_schemes_are_offered_and_beat_rounding_where_it_counts(engine, explore, monkeypatch):
    """Not in the weights' error, but in the output's: that is what calibration is for."""
    asked = []
    statistics = trial.calibration_statistics
    monkeypatch.setattr(
        trial,
        "calibration_statistics",
        lambda one, names: asked.append(list(names)) or statistics(one, names, 2),
    )
    assert {"gptq", "awq", "int4", "int8-dynamic"} <= set(explore.scheme.options)
    error = {}
    for scheme in ("int4", "gptq", "awq"):
        explore.scheme.value = scheme
        change = explore.result.after - explore.result.before
        moment = (explore._statistics or statistics(engine, ["lm_head"], 2))["lm_head"].second_moment
        error[scheme] = (change @ moment * change).sum().item()
        assert explore.status.value.count("Not possible") == 0
        assert f"lm_head in {scheme}" in explore.status.value
    assert error["gptq"] < error["int4"]
    assert error["awq"] <= error["int4"]
    assert asked == [["lm_head"]]  # once: the inputs are the model's, not the scheme's
    explore.scheme.value = "int4"


def test_what_cannot_be_calibrated_is_said(engine, monkeypatch):
    names = trial.linears_by_part(engine)["decoder"]
    monkeypatch.setattr(trial, "MOST_BYTES", 10_000_000)
    with pytest.raises(LabError, match="choose one of them"):
        trial.calibration_statistics(engine, names)
    monkeypatch.setattr(trial, "default_calibration", only_typed)
    unheard = trial.linears_by_part(engine)["speech"][-1:]
    with pytest.raises(LabError, match="no calibration item comes to"):
        trial.calibration_statistics(engine, unheard, 1)


def only_typed(processor, modalities, count, **_):
    return list(calibration_batches(processor, count, split="typed"))


def test_the_answer_changes_with_the_modules_and_the_model_does_not(engine, explore):
    item = explore.items[0]
    before = engine.generate(item.messages()).text
    names = [name for names in trial.linears_by_part(engine).values() for name in names]
    scheme = get_scheme("int4", num_bits=2, symmetric=True)
    ruined = {name: trial.try_scheme(engine.model.get_submodule(name), scheme).module for name in names}
    modules = dict(engine.model.named_modules())
    assert trial.answer(engine, item, ruined).text != before
    assert dict(engine.model.named_modules()) == modules
    assert engine.generate(item.messages()).text == before


def test_the_model_is_put_back_when_answering_fails(engine):
    head = engine.model.lm_head
    other = torch.nn.Linear(1, 1)
    with pytest.raises(RuntimeError, match="shapes"), trial.replaced(engine.model, {"lm_head": other}):
        engine.model.lm_head(torch.zeros(1, 384))
    assert engine.model.lm_head is head


def test_a_quantized_model_and_unknown_names_are_refused(engine):
    with pytest.raises(LabError, match="has no Linear called eye; there are"):
        trial.find_linear(engine.model, "eye")
    with pytest.raises(LabError, match="is a Glm4vTextModel"):
        trial.find_linear(engine.model, "model.language_model")
    with pytest.raises(LabError, match="quantized already"):
        trial.linears_by_part(load("pocket", "int8", device="cpu", progress=False))


def test_moving_a_slider_draws_everything_anew(explore):
    explore.scheme.value = "int4"
    curve, picture = np.array(explore.weights.figure.data[1].y), explore.taps.value
    bits = explore.options.controls["num_bits"]
    assert bits.tooltip == "bits a weight takes"
    bits.value = 2
    assert explore.result.scheme.num_bits == 2
    assert "2.50 bits a weight" in explore.facts.value
    assert not np.array_equal(explore.weights.figure.data[1].y, curve)
    assert explore.errors.figure.data[0].z.shape[0] <= weights.LARGEST_MAP
    explore.part.value, explore.scope.value = "decoder", ALL
    assert explore.linear.value.startswith("model.language_model.layers.")
    assert explore.taps.value != picture
    assert "every Linear of decoder in int4" in explore.status.value


def test_what_a_scheme_refuses_is_said_and_the_last_state_stays(explore):
    explore.scheme.value = "int4"
    explore.part.value = "lm_head"
    shown = explore.result
    explore.options.controls["group_size"].value = 256
    assert "Not possible:" in explore.status.value
    assert "256 does not divide 384" in explore.status.value
    assert explore.result is shown
    explore.options.controls["group_size"].value = 32
    assert "Not possible" not in explore.status.value


def test_every_scheme_without_calibration_can_be_chosen(explore):
    for name in explore.scheme.options:
        explore.scheme.value = name
        assert "Not possible" not in explore.status.value, explore.status.value
        assert explore.result.scheme.name == name


def test_a_large_matrix_is_averaged_down_for_its_map():
    matrix = np.arange(12.0).reshape(3, 4).repeat(200, 0).repeat(200, 1)
    small = weights.smaller(matrix)
    assert max(small.shape) <= weights.LARGEST_MAP
    assert small.mean() == pytest.approx(matrix.mean(), rel=1e-2)
    assert weights.smaller(np.eye(3)).tolist() == np.eye(3).tolist()


def test_a_histogram_of_magnitudes_has_no_empty_half():
    [magnitudes] = weights.histogram_traces([0.1, 0.2, 1.0])
    assert min(magnitudes.x) > 0
    assert sum(magnitudes.y) == pytest.approx(1)


def test_a_histogram_counts_every_weight_once():
    before, after = weights.histogram_traces([-1.0, 0.1, 0.2, 1.0], [-1.0, 0.0, 0.0, 1.0])
    assert sum(before.y) == pytest.approx(1)
    assert max(after.y) == 0.5
