"""What the notebooks say of the pocket model's weights is what the weights show: a training that changes it is noticed."""

import math
import re
from pathlib import Path

import nbformat
import pytest

import labkit
from labkit.interactive.trial import Trial
from labkit.models import get_spec
from labkit.quantization import affine
from labkit.results import shipped

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
FRACTIONS = {"a third": 3, "a quarter": 4, "a fifth": 5, "a tenth": 10, "a twelfth": 12, "a fourteenth": 14}
TIMES = {"three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "twelve": 12, "sixteen": 16}

pytestmark = pytest.mark.skipif(
    get_spec("pocket").availability() != "here", reason="the pocket model is not in assets"
)


def said(name, cell):
    [path] = NOTEBOOKS.glob(f"{name}_*.ipynb")
    return next(one.source for one in nbformat.read(path, as_version=4).cells if one.id == cell)


def number(pattern, text):
    found = re.search(pattern, text)
    assert found, f"{pattern!r} is not said in {text!r}"
    return found[1]


@pytest.fixture(scope="module")
def engine():
    return labkit.load("pocket", "fp32", progress=False)


@pytest.fixture(scope="module")
def layer(engine):
    return Trial.of(engine, "model.language_model.layers.1.mlp.down_proj")


def row_db(rows, symmetric):
    """Signal to noise of each row in 4 bits with one scale."""
    scale, zero_point = affine.choose_qparams(rows, 4, None, symmetric)
    after = affine.dequantize(affine.quantize(rows, scale, zero_point, 4, symmetric), scale, zero_point)
    return 10 * ((rows**2).sum(1) / ((after - rows) ** 2).sum(1)).log10()


def test_a_zero_point_is_worth_what_notebook_02_says(engine):
    head = engine.model.lm_head.weight.detach()
    gain = (row_db(head, False) - row_db(head, True)).mean().item()
    assert gain == pytest.approx(float(number(r"is worth ([\d.]+) dB", said("02", "compare-after"))), abs=0.1)
    shown = int(number(r"head\[(\d+), :32\]", said("02", "import")))
    row = head[shown, :32]
    assert (row / row.abs().max() * 7).round().min() > -5  # "the lowest codes are never used"
    gains = row_db(head[:, :32], False) - row_db(head[:, :32], True)
    assert gains[shown] > gain + 1  # "more lopsided than most"


@pytest.mark.slow
def test_notebook_03_tells_the_decibels_of_its_layer(engine, layer):
    calm = Trial.of(engine, "model.language_model.layers.1.self_attn.q_proj")
    costs = [one.output_db("int8") - one.output_db("int8-dynamic") for one in (calm, layer)]
    text = said("03", "int8-after")
    assert costs[0] == pytest.approx(int(number(r"cost (\d+) dB", text)), abs=0.6)
    assert costs[1] == pytest.approx(int(number(r"they cost (\d+):", text)), abs=0.6)
    allowed = int(number(r"the (\d+) dB that 8-bit weights allow", said("03", "threshold-after")))
    assert layer.output_db("int8") == pytest.approx(allowed, abs=0.6)
    assert layer.output_db("llm-int8") > allowed - 1  # "at the usual 6 next to nothing is lost"
    back = (layer.output_db("int8-dynamic:smoothing=rms") - layer.output_db("int8-dynamic")) / costs[1]
    assert 0.4 < back < 0.6  # "smoothing wins back about half"
    assert 0.4 < layer.outlier_share(6) < 0.5  # "nearly half of the channels"
    left = layer.output_db("int4")
    assert left == pytest.approx(int(number(r"leaves (\d+) dB", said("03", "weights-before"))), abs=0.6)


@pytest.mark.slow
def test_notebook_03_tells_what_the_solve_leaves(layer):
    nearest, plain, ordered = (sum(map(float, errors)) for errors in layer.solve_errors().values())
    text = said("03", "curves-after")
    for error, pattern in (
        (plain, r"leaves (a \w+) of the error"),
        (ordered, r"in the right order (a \w+)\."),
    ):
        assert nearest / error == pytest.approx(FRACTIONS[number(pattern, text)], rel=0.12)
    gain = layer.output_db("gptq") - layer.output_db("int4")
    text = said("03", "methods-after")
    assert gain == pytest.approx(TIMES[number(r"^(\w+) decibels", text).lower()], abs=0.6)
    assert math.isclose(10 ** (-gain / 20), 0.4, abs_tol=0.04)  # "two fifths of the error"
    assert layer.output_db("gptq-3bit") > layer.output_db(
        "int4"
    )  # "solved with 3 bits, better than rounded with 4"


def test_notebook_05_tells_the_shipped_decoding_speeds():
    rates = {m.plan: m.decode_tokens_per_s for m in shipped.load("pocket-cpu").measurements}
    text = said("05", "latency-after")
    fast, slow = (
        TIMES[number(pattern, text)] for pattern in (r"(\w+) times as fast", r"(\w+) times as slowly")
    )
    assert rates["int4"] / rates["fp32"] == pytest.approx(fast, rel=0.1)
    assert rates["fp32"] / rates["nf4"] == pytest.approx(slow, rel=0.1)
