"""Calibrated quantization of whole models: better than rounding, resumable, and clear about what it lacks."""

import copy
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_models
import torch
from torch import nn

from labkit.common.errors import LabError
from labkit.loading.calibration import default_calibration
from labkit.models.families import find_roles
from labkit.plans import calibrate
from labkit.plans.calibrate import input_statistics
from labkit.plans.plan import PlanError, QuantizationPlan
from labkit.plans.quantize import quantize_, weights_bytes
from labkit.quantization import QuantizedLinear, SchemeError, get_scheme
from labkit.quantization.affine import sqnr_db
from labkit.quantization.int4 import Int4Linear

ROOT = Path(__file__).resolve().parents[2]


def sequences(count=6, length=48, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randint(0, 200, (count, 1, length), generator=generator))


@pytest.fixture(scope="module")
def llama():
    return tiny_models.llama()


def quantized(model, plan, calibration=None, **options):
    model = copy.deepcopy(model)
    if isinstance(plan, str):
        plan = QuantizationPlan.uniform(plan, default="fp32", group_size=32)
    return model, quantize_(model, plan, calibration, progress=False, **options)


def quality(model, reference):
    ids = torch.cat(sequences(4, 48, seed=9))
    with torch.inference_mode():
        return sqnr_db(reference(ids).logits, model(ids).logits)


def test_methods_in_the_order_of_their_quality_on_a_language_model(llama):
    found = {
        name: quality(quantized(llama, name, sequences(24))[0], llama)
        for name in ("int4", "hqq", "awq", "gptq")
    }
    assert found["gptq"] > found["int4"] + 1
    assert found["awq"] > found["int4"] + 0.3
    assert found["hqq"] > found["int4"] + 0.1


def test_making_up_for_drift_helps_the_whole_model(llama):
    found = []
    for share in (0.0, 1.0):
        plan = QuantizationPlan.uniform(
            "gptq", default="fp32", group_size=32, num_bits=3, drift_correction=share
        )
        found.append(quality(quantized(llama, plan, sequences(48))[0], llama))
    assert found[1] > found[0] + 0.3


def test_every_part_of_the_pocket_model_is_solved_and_bytes_are_the_predicted_ones():
    model, processor = tiny_models.pocket()
    batches = default_calibration(processor, ("image", "audio"), 6)
    with torch.inference_mode():
        expected = model(**batches[0]).logits
    resolved = quantize_(model, "gptq", batches, progress=False)
    assert {resolved.schemes[name].name for name in resolved.schemes} == {"gptq"}
    roles = find_roles(tiny_models.pocket()[0])
    assert {roles[name] for name in resolved.schemes} == {
        "vision", "projector", "speech", "cross_modal", "decoder", "lm_head",
    }  # fmt: skip
    assert all(type(model.get_submodule(name)) is Int4Linear for name in resolved.schemes)
    assert weights_bytes(model) == resolved.predicted_bytes
    with torch.inference_mode():
        assert sqnr_db(expected, model(**batches[0]).logits) > 3


def test_layers_are_calibrated_on_quantized_ones_before_them(llama, monkeypatch):
    moments = []
    cls = type(get_scheme("gptq"))
    original = cls.quantize_linear

    def spy(self, linear, *, statistics=None, **options):
        moments.append(statistics.second_moment)
        return original(self, linear, statistics=statistics, **options)

    monkeypatch.setattr(cls, "quantize_linear", spy)
    plan = {
        "name": "p",
        "rules": [{"role": "decoder", "scheme": "gptq", "group_size": 32}],
        "default": "fp32",
    }
    model, _ = quantized(llama, QuantizationPlan.from_dict(plan), sequences())
    last = "model.layers.1.mlp.down_proj"
    after, before = (input_statistics(m, [last], sequences())[last].second_moment for m in (model, llama))
    torch.testing.assert_close(moments[-1], after, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(moments[-1], before, rtol=1e-2)


def test_mixed_plans_solve_what_needs_calibration_and_round_the_rest(llama):
    rules = [
        {"match": "re:.*layers\\.0\\..*", "scheme": "int8"},
        {"match": "lm_head", "scheme": "fp16"},
        {"match": "re:.*", "scheme": "gptq", "group_size": 32},
    ]
    model, resolved = quantized(llama, QuantizationPlan.from_dict({"name": "p", "rules": rules}), sequences())
    assert {resolved.schemes[name].name for name in resolved.schemes} == {"int8", "fp16", "gptq"}
    assert weights_bytes(model) == resolved.predicted_bytes
    assert quality(model, llama) > 10


def test_a_tied_head_that_is_named_is_solved_and_the_embedding_stays(llama):
    from transformers import LlamaForCausalLM

    config = copy.deepcopy(llama.config)
    config.tie_word_embeddings = True
    torch.manual_seed(1)
    tied = LlamaForCausalLM(config).eval()
    embedding = tied.model.embed_tokens.weight.detach().clone()
    plan = {"name": "p", "rules": [{"match": "lm_head", "scheme": "gptq", "group_size": 32}]}
    resolved = quantize_(tied, QuantizationPlan.from_dict(plan), sequences(), progress=False)
    assert isinstance(tied.lm_head, QuantizedLinear)
    assert torch.equal(tied.model.embed_tokens.weight, embedding.bfloat16())
    assert weights_bytes(tied) == resolved.predicted_bytes


def test_any_module_in_training_mode_with_tuples_as_batches():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.Dropout(0.5), nn.GELU(), nn.Linear(96, 64)).train()
    x = torch.randn(200, 64)
    expected = copy.deepcopy(model).eval()(x)
    quantize_(model, QuantizationPlan.uniform("gptq", group_size=32), [(x,)], progress=False)
    assert model.training
    assert model[1].training
    assert sqnr_db(expected, model.eval()(x)) > 18


def test_missing_calibration_is_refused_before_anything_is_changed(llama):
    model = copy.deepcopy(llama)
    with pytest.raises(PlanError, match="plan gptq, rule 1: gptq needs calibration batches"):
        quantize_(model, "gptq", progress=False)
    with pytest.raises(LabError, match="there are no calibration batches"):
        quantize_(model, "gptq", [], progress=False)
    assert not any(isinstance(module, QuantizedLinear) for module in model.modules())


def test_parts_that_no_batch_comes_to_are_named():
    model, _ = tiny_models.pocket()
    text = [{"input_ids": torch.tensor([[30, 31, 32, 33]])}]
    with pytest.raises(LabError, match=r"comes to model\.visual\.blocks\.0.*images for a vision encoder"):
        quantize_(model, "gptq", text, progress=False)


def test_what_cannot_be_solved_is_refused_by_name(llama):
    model = copy.deepcopy(llama)
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(
        SchemeError, match=r"model\.layers\.1\.mlp\.up_proj: the weight holds values that are not"
    ):
        quantize_(model, "gptq", sequences(), progress=False)


@pytest.mark.parametrize("where", ["statistics", "pass"])
def test_too_little_memory_is_told_with_what_helps(llama, monkeypatch, where):
    def full(*_, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    if where == "statistics":
        monkeypatch.setattr(calibrate.InputStatistics, "add", full)
    else:
        monkeypatch.setattr(type(llama.model.norm), "forward", full)
    with pytest.raises(LabError, match=r"fewer or shorter ones, or .*drift_correction: 0\.0\), which halves"):
        quantized(llama, "gptq", sequences())


def states_equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_an_interrupted_run_continues_to_the_same_bits(llama, tmp_path, monkeypatch):
    whole, _ = quantized(llama, "gptq", sequences())
    solved = []
    original = calibrate.InputStatistics.add

    def interrupt_later(self, *arguments):
        solved.append(1)
        if len(solved) == 40:
            raise KeyboardInterrupt
        return original(self, *arguments)

    monkeypatch.setattr(calibrate.InputStatistics, "add", interrupt_later)
    with pytest.raises(KeyboardInterrupt):
        quantized(llama, "gptq", sequences(), work_folder=tmp_path / "work")
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "work").glob("*.safetensors")}
    assert 3 < len(kept) < 14
    continued, _ = quantized(llama, "gptq", sequences(), work_folder=tmp_path / "work")
    assert states_equal(whole, continued)
    for name, time_ns in kept.items():
        assert (tmp_path / "work" / name).stat().st_mtime_ns == time_ns
    solved.clear()
    again, _ = quantized(llama, "gptq", sequences(), work_folder=tmp_path / "work")
    assert states_equal(whole, again)
    assert not solved  # everything was there


def test_a_work_folder_of_another_run_is_refused(llama, tmp_path):
    quantized(llama, "gptq", sequences(), work_folder=tmp_path)
    with pytest.raises(LabError, match="a run with another calibration: give another folder"):
        quantized(llama, "gptq", sequences(seed=1), work_folder=tmp_path)
    other = tiny_models.llama(seed=1)
    with pytest.raises(LabError, match="another weights"):
        quantized(other, "gptq", sequences(), work_folder=tmp_path)
    with pytest.raises(LabError, match="another plan"):
        quantized(llama, "awq", sequences(), work_folder=tmp_path)


def test_a_damaged_module_is_made_again_and_a_damaged_work_folder_is_named(llama, tmp_path):
    whole, _ = quantized(llama, "gptq", sequences(), work_folder=tmp_path)
    path = tmp_path / "model.layers.1.mlp.up_proj.safetensors"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-9])
    assert states_equal(whole, quantized(llama, "gptq", sequences(), work_folder=tmp_path)[0])
    assert path.stat().st_size == size
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(LabError, match=r"run\.json is damaged: delete"):
        quantized(llama, "gptq", sequences(), work_folder=tmp_path)
    (tmp_path / "run.json").unlink()
    with pytest.raises(LabError, match="holds other files"):
        quantized(llama, "gptq", sequences(), work_folder=tmp_path)


RUN = """
import sys, torch, tiny_models, test_calibrate
from labkit.plans.finished import WorkFolder
save = WorkFolder.save
def tell(self, name, module):
    save(self, name, module)
    print(name, flush=True)
WorkFolder.save = tell
test_calibrate.quantized(tiny_models.llama(), "gptq", test_calibrate.sequences(24), work_folder=sys.argv[1])
"""


@pytest.mark.slow
def test_a_killed_process_loses_at_most_the_layer_under_way(llama, tmp_path):
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)])
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, str(tmp_path)],
        stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": paths},
    )  # fmt: skip
    told = [process.stdout.readline().strip() for _ in range(5)]
    time.sleep(0.02)  # somewhere in the next one
    process.send_signal(signal.SIGKILL)
    told += process.stdout.read().split()
    process.wait()
    assert process.returncode == -signal.SIGKILL
    kept = {path.name.removesuffix(".safetensors") for path in tmp_path.glob("[!.]*.safetensors")}
    assert set(told) <= kept
    assert len(kept) <= len(told) + 1
    continued, _ = quantized(llama, "gptq", sequences(24), work_folder=tmp_path)
    assert states_equal(quantized(llama, "gptq", sequences(24))[0], continued)


@pytest.mark.gpu
def test_weights_on_the_cpu_are_solved_on_the_gpu(llama):
    model = copy.deepcopy(llama)
    quantize_(
        model, QuantizationPlan.uniform("gptq", group_size=32), sequences(), device="cuda", progress=False
    )
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"cuda"}
    ids = sequences()[0]
    with torch.inference_mode():
        assert sqnr_db(llama(ids).logits, model(ids.cuda()).logits.cpu()) > 8
