"""The tool that times GPTQ on a few layers of a large model, at tiny size."""

import argparse
from pathlib import Path

import pytest
import time_gptq
import tiny_models

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tool():
    return time_gptq


def test_a_layer_takes_what_lies_between_the_ends_of_two(tool):
    clock = tool.Clock(tool.torch.device("cpu"))
    clock.finished = {
        "merger": 1.0, "layers.0.q": 5.0, "layers.0.down": 9.0, "layers.1.q": 10.0, "layers.1.down": 12.0,
        "layers.2.down": 16.0, "lm_head": 30.0,
    }  # fmt: skip
    assert clock.layers() == {"layers": [3.0, 4.0]}
    found = tool.extrapolated(
        40.0, {"layers": [3.0, 4.0, 4.0], "visual.blocks": [1.0]}, {"text": 10, "vision": 2}, 3
    )
    assert found["stacks"]["layers"] == {"layer_s": 4.0, "layers_left_out": 7}
    assert found["extrapolated_s"] == 40 + 7 * 4.0


def test_a_tall_model_is_shortened_and_every_linear_of_the_rest_solved(tool, tmp_path):
    config = tiny_models.glm4v_config()
    config.text_config.num_hidden_layers, config.vision_config.depth = 7, 5
    config.text_config.vocab_size = 600
    config.architectures = ["Glm4vForConditionalGeneration"]
    config.save_pretrained(tmp_path)
    options = argparse.Namespace(
        model=str(tmp_path), plan="gptq", layers=2, samples=2, tokens=160, device="cpu"
    )
    found = tool.measure(options)
    stacks = found["stacks"]
    assert {name: one["layers_left_out"] for name, one in stacks.items()} == {
        "model.visual.blocks": 3, "model.language_model.layers": 5,
    }  # fmt: skip
    left_out = sum(one["layer_s"] * one["layers_left_out"] for one in stacks.values())
    assert found["extrapolated_s"] == pytest.approx(found["measured_s"] + left_out)
    assert sum(".language_model.layers.1." in name for name in found["finished_s"]) == 6
    assert list(found["finished_s"].values()) == sorted(found["finished_s"].values())
    with pytest.raises(SystemExit, match="a screenshot takes 136 tokens: give --tokens 153 or more"):
        tool.measure(argparse.Namespace(**{**vars(options), "tokens": 100}))
