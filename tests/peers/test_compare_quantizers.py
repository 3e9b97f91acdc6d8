"""The tool that sets other libraries' weights beside the lab's, without any of them."""

import json
import math
from pathlib import Path

import compare_quantizers
import pytest
import tiny_models
import torch
from safetensors.torch import load_file

from labkit.loading.datasets import Datasets
from labkit.measure.perplexity import compare_perplexity
from labkit.quantization import affine

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def call(tool, monkeypatch):
    """Run the tool with these words on its command line."""

    def run(*words):
        monkeypatch.setattr("sys.argv", ["compare_quantizers.py", *map(str, words)])
        tool.main()

    return run


@pytest.fixture(scope="module")
def tool():
    return compare_quantizers


def rounded(weight, bits=4):
    """A weight [N, K] on a grid in groups of 32, and its scale."""
    qparams = affine.choose_qparams(weight, bits, 32, False, torch.float32)
    return affine.dequantize(affine.quantize(weight, *qparams, bits), *qparams), qparams[0]


def save_tiny(folder):
    """A tiny Llama, saved with its tokenizer."""
    tiny_models.llama().save_pretrained(folder)
    tiny_models.tokenizer().save_pretrained(folder)
    return folder


def test_a_weight_on_a_grid_comes_back_from_its_codes(tool):
    original = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    weight, scale = rounded(original)
    found = tool.steps_of("a", weight, scale, 4, original)
    assert found["codes"].dtype == torch.uint8
    assert found["codes"].max() <= 15
    assert torch.allclose(tool.weight_of(**found), weight, atol=1e-6)
    signed = tool.steps_of("a", weight, -scale, 4, original)  # some libraries' scales have a sign
    assert torch.allclose(tool.weight_of(**signed), weight, atol=1e-6)


def test_weights_off_the_grid_too_many_codes_and_unchanged_weights_are_refused(tool):
    original = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    weight, scale = rounded(original)
    with pytest.raises(SystemExit, match="not 4 bits"):
        tool.steps_of("a", original, scale, 4, original)
    with pytest.raises(SystemExit, match="not 3 bits"):
        tool.steps_of("a", weight, scale, 3, original)
    with pytest.raises(SystemExit, match="as it was"):
        tool.steps_of("a", weight, scale, 4, weight)


def test_a_library_is_given_the_labs_calibration_and_judged_as_the_lab_is(
    tool, call, tmp_path, monkeypatch, capsys
):
    model, text = save_tiny(tmp_path / "tiny"), ROOT / "LICENSE"
    datasets = Datasets(calibration=6, probe=3, validation=12, text=str(text), length=64)
    beside = compare_perplexity(
        model, "int4:group_size=32", datasets=datasets, output=tmp_path / "ours", progress=False
    )
    given = {}

    def run(options, ids):
        given["ids"] = ids
        for name, linear in tool.linears_of(tool.read_model(options.model)).items():
            yield name, *rounded(linear.weight.detach()), 4, 4

    monkeypatch.setitem(tool.LIBRARIES, "hqq", ("torch", run, ("bits", "group_size")))

    peers = tmp_path / "peers"
    call("text", model, text, peers, "--beside", tmp_path / "ours")
    call("quantize", model, peers, "hqq", "--group-size", "32", "--name", "theirs")
    for _ in range(2):  # what is measured is not measured again
        call("measure", model, text, peers, "--beside", tmp_path / "ours")
    found = json.loads((tmp_path / "ours" / "peers.json").read_text())
    [record] = found["records"]
    assert torch.tensor(given["ids"]).shape == (6, 64)
    assert given["ids"] == datasets.sequences(tiny_models.tokenizer(), "calibration").tolist()
    assert record["plan"] == "theirs"
    assert record["bits"] == 4 + (16 + 4) / 32
    assert record["options"] == {"bits": 4, "group_size": 32}
    # rounded as in the lab, whose scales are bf16: nearly the same losses
    ours = beside.records[1]["losses"]
    assert record["losses"] == pytest.approx(ours, rel=5e-3)
    assert record["perplexity"] == pytest.approx(math.exp(sum(record["losses"]) / 12))
    assert record["losses"] != beside.records[0]["losses"]
    assert "theirs" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="not the text"):
        call("measure", model, ROOT / "README.md", peers, "--beside", tmp_path / "ours")


def test_what_a_library_folds_into_norms_is_laid_in_and_taken_out_again(tool, call, tmp_path, monkeypatch):
    model, text = save_tiny(tmp_path / "tiny"), ROOT / "LICENSE"
    datasets = Datasets(calibration=4, probe=2, validation=6, text=str(text), length=64)
    compare_perplexity(model, "int8", datasets=datasets, output=tmp_path / "ours", progress=False)

    def run(options, ids):
        """Powers of two change no code: with the norms halved, the model means the same."""
        unquantized = tool.read_model(options.model)
        halved = options.name == "b-folded"
        for name, linear in tool.linears_of(unquantized).items():
            follows_norm = name.endswith(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"))
            yield name, *rounded(linear.weight.detach() * (2 if halved and follows_norm else 1)), 4, 4
        for name, other in tool.others_of(unquantized).items():
            yield name, other / 2 if halved and "layernorm" in name else other

    monkeypatch.setitem(tool.LIBRARIES, "hqq", ("torch", run, ("bits", "group_size")))
    peers = tmp_path / "peers"
    call("text", model, text, peers, "--beside", tmp_path / "ours")
    for name in ("a-plain", "b-folded", "c-plain"):  # measured in this order
        call("quantize", model, peers, "hqq", "--group-size", "32", "--name", name)
    kept = {name: set(load_file(peers / name / tool.TENSORS)) for name in ("a-plain", "b-folded")}
    norms = {name for name in tool.others_of(tool.read_model(model)) if "layernorm" in name}
    assert len(norms) == 4
    assert kept["b-folded"] - kept["a-plain"] == norms
    call("measure", model, text, peers, "--beside", tmp_path / "ours")
    records = json.loads((tmp_path / "ours" / "peers.json").read_text())["records"]
    losses = {one["plan"]: one["losses"] for one in records}
    assert losses["b-folded"] == pytest.approx(losses["a-plain"], rel=1e-5)
    assert losses["c-plain"] == losses["a-plain"]
