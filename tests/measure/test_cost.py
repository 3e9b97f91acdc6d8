"""What an engine costs: fields, samples, and bytes that add up."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models
import torch
from PIL import Image

from labkit.common import machine
from labkit.common.errors import LabError
from labkit.engine.engine import Engine
from labkit.measure.cost import bytes_by_role, measure, peak_memory
from labkit.models import find_roles
from labkit.models.processors import TemplateProcessor
from labkit.models.spec import ModelSpec
from labkit.plans.quantize import quantize_, weights_bytes
from labkit.results.measurement import Measurement


class PlainItem:
    """As much of a PhoneTap item as measuring needs."""

    def __init__(self, number):
        self.number = number

    def messages(self):
        picture = Image.new("RGB", (56, 56), (self.number, 0, 0))
        return [
            {
                "role": "user",
                "content": [
                    {"type": "image", "image": picture},
                    {"type": "text", "text": f"tap {self.number}"},
                ],
            }
        ]


def engine_of(model, images=None, plan=None):
    roles = find_roles(model)
    resolved = quantize_(model, plan, roles=roles, progress=False) if plan else None
    processor = TemplateProcessor(tiny_models.tokenizer(), images)
    return Engine(model, processor, spec=ModelSpec("tiny", "."), resolved=resolved, roles=roles, load_s=1.5)


@pytest.fixture(scope="module")
def cost():
    engine = engine_of(tiny_models.glm4v(), tiny_models.image_processor(), "int8")
    return engine, measure(engine, [PlainItem(n) for n in range(20)], prompts=4, warmup=1, max_new_tokens=12)


def test_the_fields_make_a_measurement_that_can_be_saved(cost):
    _, fields = cost
    row = Measurement(model="tiny", plan="int8", device="cpu", **fields)
    again = Measurement.from_dict(json.loads(json.dumps(row.to_dict())))
    assert again == row
    assert again.load_s == 1.5


def test_medians_come_from_the_samples(cost):
    _, fields = cost
    samples = fields["samples"]
    assert len(samples["ttft_s"]) == 4
    assert fields["ttft_s"] == pytest.approx(sorted(samples["ttft_s"])[1:3][0], rel=1.0)
    assert min(samples["ttft_s"]) <= fields["ttft_s"] <= max(samples["ttft_s"])
    assert fields["answer_s"] > fields["ttft_s"]
    assert len(samples["token_s"]) == sum(count - 1 for count in samples["completion_tokens"])
    assert fields["environment"]["threads"] == torch.get_num_threads()
    assert fields["environment"]["dtype"] == "bfloat16"


def test_bytes_are_the_models_and_the_predicted_ones(cost):
    engine, fields = cost
    assert fields["weights_bytes"] == weights_bytes(engine.model) == fields["predicted_bytes"]
    assert sum(fields["bytes_by_role"].values()) == fields["weights_bytes"]
    assert set(fields["bytes_by_role"]) == {"vision", "projector", "decoder", "embedding", "lm_head", "other"}


def test_memory_of_the_cpu_is_the_process_and_is_called_so(cost):
    _, fields = cost
    assert fields["peak_memory_kind"] == "process peak RSS"
    assert fields["weights_bytes"] < fields["peak_memory_bytes"] <= peak_memory(torch.device("cpu"))


def test_a_tied_weight_is_counted_once():
    config = tiny_models.llama_config()
    config.tie_word_embeddings = True
    from transformers import LlamaForCausalLM

    engine = engine_of(LlamaForCausalLM(config))
    by_role = bytes_by_role(engine)
    assert by_role["lm_head"] + by_role["embedding"] == config.vocab_size * config.hidden_size * 4
    assert sum(by_role.values()) == weights_bytes(engine.model)


def test_a_text_model_is_measured_on_text():
    fields = measure(engine_of(tiny_models.llama()), prompts=3, warmup=0, max_new_tokens=5)
    assert len(fields["samples"]["ttft_s"]) == 3
    assert fields["decode_tokens_per_s"] > 0


def test_answers_of_one_token_have_no_decoding_rate():
    fields = measure(engine_of(tiny_models.llama()), prompts=2, warmup=0, max_new_tokens=1)
    assert fields["decode_tokens_per_s"] is None
    assert fields["samples"]["decode_tokens_per_s"] == []


def test_impossible_counts_are_refused():
    engine = engine_of(tiny_models.llama())
    with pytest.raises(LabError, match="prompts is 0"):
        measure(engine, prompts=0)
    with pytest.raises(LabError, match="no items"):
        measure(engine_of(tiny_models.glm4v(), tiny_models.image_processor()), [])


def test_the_peak_of_a_small_process_is_its_own_and_not_that_of_the_process_that_started_it():
    ballast = bytearray(400 << 20)
    ballast[::4096] = bytes([1]) * len(ballast[::4096])
    code = "from labkit.common.machine import peak_rss; print(*peak_rss())"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    peak, kind = printed.split(maxsplit=1)
    if kind.strip() == "process peak RSS":
        assert 5e6 < int(peak) < 2e8 < len(ballast)
    else:
        assert "process that started it" in kind


def test_a_peak_that_may_be_another_process_s_is_called_so(monkeypatch):
    monkeypatch.setattr(machine, "Path", lambda _: Path("/nowhere/status"))
    peak, kind = machine.peak_rss()
    assert peak > 1e7
    assert kind.endswith("(ru_maxrss: perhaps that of the process that started it)")
