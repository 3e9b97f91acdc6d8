"""`labkit quantize`: what is wrong is told before the model is read; a run that is killed loses one module."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from checkpoint_models import HELLO, logits, save_glm4v, save_llama

from labkit.cli.main import main
from labkit.common.errors import CheckpointError, Interrupted, LabError
from labkit.common.files import sha256_of
from labkit.loading.load import load
from labkit.loading.manifest import Manifest
from labkit.loading.quantize_to import CalibrationSettings, quantize_to
from labkit.measure.anatomy import dissect
from labkit.models.checkpoint import Checkpoint
from labkit.plans.finished import WorkFolder
from labkit.plans.plan import QuantizationPlan
from labkit.quantization.int4 import Int4

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("models") / "llama", num_hidden_layers=4)


@pytest.fixture(scope="module")
def expected(model, tmp_path_factory):
    """Hash of the packed tensors of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "q"
    return sha256_of(quantize_to(model, "int4", folder, "cpu", progress=False).folder / "packed.safetensors")


def run(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return code, out, err.splitlines()[-1] if err.strip() else ""


def test_the_command_makes_a_folder_that_can_be_asked(model, tmp_path, capsys):
    folder = tmp_path / "small"
    code, out, _ = run(capsys, "quantize", model, "--plan", "int4", "--output", folder, "--device", "cpu")
    assert code == 0
    assert f"{folder}: " in out
    assert "of weights" in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small"]
    code, out, err = run(capsys, "ask", folder, "hello", "--max-new-tokens", 3, "--device", "cpu")
    assert (code, "3 tokens" in err) == (0, True)
    code, out, _ = run(capsys, "models", folder)
    assert code == 0
    assert "llama under the plan int4" in out
    assert "29 in int4 (num_bits 4, group_size 64, symmetric False)" in out
    assert "as they were written" in out
    code, _, err = run(capsys, "ask", folder, "hello", "--plan", "int8", "--device", "cpu")
    assert (code, "small is quantized already, by the plan int4" in err) == (2, True)
    code, _, err = run(capsys, "plans", "--model", folder)
    assert (code, "small is quantized already" in err) == (2, True)
    with pytest.raises(LabError, match="small is quantized already"):
        dissect(folder)
    code, _, err = run(capsys, "quantize", folder, "--plan", "int8", "--output", tmp_path / "more")
    assert (code, "quantize the model that it was made of" in err) == (2, True)


def test_what_is_wrong_is_told_before_the_model_is_read(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Checkpoint, "weights", lambda *_: pytest.fail("the weights were read"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    for arguments, told in (
        ((model, "--plan", "int5", "--output", tmp_path / "x"), "presets are"),
        ((model, "--plan", "int4", "--output", tmp_path / "full"), "never deleted"),
        ((model, "--plan", "int4", "--output", tmp_path / "full/file/x"), "cannot be made"),
        ((model, "--plan", "int4", "--output", tmp_path / "x", "--device", "cuda:9"), "cuda:9"),
        ((tmp_path, "--plan", "int4", "--output", tmp_path / "x"), "no config.json"),
    ):
        code, _, err = run(capsys, "quantize", *arguments)
        assert (code, told in err) == (2, True), err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]
    with pytest.raises(CheckpointError, match="at least 1, not 0"):
        CalibrationSettings(items=0)


def count_quantized(monkeypatch):
    """A list that grows by every Linear that int4 quantizes."""
    done, original = [], Int4.fill

    def fill(self, module, weight):
        done.append(module)
        original(self, module, weight)

    monkeypatch.setattr(Int4, "fill", fill)
    return done


def test_an_interrupted_run_continues_where_it_stopped(model, tmp_path, monkeypatch, expected, capsys):
    done, original, target = count_quantized(monkeypatch), WorkFolder.save, tmp_path / "q"

    def save(self, name, module):
        original(self, name, module)
        if len(done) == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(WorkFolder, "save", save)
        with pytest.raises(Interrupted, match=r"5 of 29 Linears are kept in .*q\.partial"):
            quantize_to(model, "int4", target, "cpu", progress=False)
    assert not target.exists()
    code, out, _ = run(capsys, "quantize", model, "--plan", "int4", "--output", target, "--device", "cpu")
    assert code == 0
    assert "5 Linears were finished by an earlier run" in out
    assert len(done) == 29
    assert sha256_of(target / "packed.safetensors") == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["q"]


def test_another_run_is_refused_or_dropped(model, tmp_path, monkeypatch):
    target = tmp_path / "q"
    with monkeypatch.context() as patch:
        patch.setattr(WorkFolder, "save", interrupt)
        with pytest.raises(Interrupted):
            quantize_to(model, "int4", target, "cpu", progress=False)
    with pytest.raises(CheckpointError, match=r"holds a run with another plan: give another folder"):
        quantize_to(model, "int8", target, "cpu", progress=False)
    assert quantize_to(model, "int8", target, "cpu", force=True, progress=False).continued == 0
    assert Manifest.read(target).plan["name"] == "int8"
    assert not (tmp_path / "q.partial").exists()


def interrupt(*_):
    raise KeyboardInterrupt


def test_two_processes_do_not_write_one_folder(model, tmp_path):
    partial = tmp_path / "q.partial"
    work = WorkFolder(partial, {"model": "m"})
    with pytest.raises(CheckpointError, match=r"another process is writing .*q\.partial"):
        WorkFolder(partial, {"model": "m"})
    work.close()
    WorkFolder(partial, {"model": "m"}).remove()
    assert not partial.exists()


def test_a_finished_module_that_is_damaged_is_made_again(model, tmp_path, monkeypatch, expected):
    target, original = tmp_path / "q", WorkFolder.save

    def save(self, name, module):
        original(self, name, module)
        if self.saved == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(WorkFolder, "save", save)
        with pytest.raises(Interrupted):
            quantize_to(model, "int4", target, "cpu", progress=False)
    files = sorted((tmp_path / "q.partial").glob("*.safetensors"))
    files[0].write_bytes(files[0].read_bytes()[:-50])
    made = quantize_to(model, "int4", target, "cpu", progress=False)
    assert made.continued == 3
    assert sha256_of(target / "packed.safetensors") == expected


KILLER = """
import os, signal, sys
import labkit.plans.finished, labkit.loading.tensors, labkit.common.files
from labkit.loading.quantize_to import quantize_to

where, number, model, target = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
calls = 0

def die_at(holder, name, half=False):
    original = getattr(holder, name)
    def wrapped(*arguments, **options):
        global calls
        calls += 1
        if calls == number:
            if half:
                original(*arguments, **options)
                path = arguments[1]
                with open(path, "rb+") as file:
                    file.truncate(os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)
    setattr(holder, name, wrapped)

if where == "module":
    die_at(labkit.plans.finished, "save_file", half=True)
elif where == "tensors":
    die_at(labkit.loading.tensors, "save_file", half=True)
elif where == "hashes":
    die_at(labkit.loading.save, "file_facts")
elif where == "exchange":
    die_at(labkit.common.files, "_exchange")
elif where == "remove":
    die_at(labkit.plans.finished.WorkFolder, "remove")
quantize_to(model, "int4", target, "cpu", force=True, progress=False)
"""


@pytest.mark.parametrize(
    ("where", "number", "left"),
    [("module", 7, 6), ("tensors", 1, 29), ("hashes", 1, 29), ("exchange", 1, 29), ("remove", 1, None)],
)
def test_a_process_killed_anywhere_leaves_whole_files_and_all_finished_modules(
    model, tmp_path, expected, where, number, left
):
    target = tmp_path / "q"
    before = quantize_to(model, "int8", target, "cpu", progress=False).folder
    old = sha256_of(before / "packed.safetensors")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", KILLER, where, str(number), str(model), str(target)]
    killed = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    # what stands there loads: the old checkpoint, or the new one
    now = sha256_of(target / "packed.safetensors")
    assert now == (expected if where == "remove" else old)
    load(target, device="cpu", progress=False)
    made = quantize_to(model, "int4", target, "cpu", force=True, progress=False)
    assert made.continued == (29 if left is None else left)
    assert sha256_of(target / "packed.safetensors") == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["q"]


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["int4", "gptq"])
def test_a_process_killed_at_random_moments_ends_with_the_same_checkpoint(model, tmp_path, plan):
    text = tmp_path / "text.txt"
    text.write_text((ROOT / "LICENSE").read_text(encoding="utf-8"), encoding="utf-8")
    calibration = CalibrationSettings(items=12, text=str(text))
    whole = quantize_to(
        model, plan, tmp_path / "whole", "cpu", calibration=calibration, progress=False
    ).folder
    target, partial = tmp_path / "q", tmp_path / "q.partial"
    command = [sys.executable, "-m", "labkit", "quantize", str(model), "--plan", plan, "--device", "cpu"]
    command += ["--calibration-text", str(text), "--calibration-items", "12", "--output", str(target)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    moments, finished = random.Random(0), 0
    for _ in range(4):
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while process.poll() is None and not partial.exists():
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 1.5))
        process.kill()
        process.wait()
        modules = len(list(partial.glob("model.*")) + list(partial.glob("lm_head*")))
        assert target.exists() or modules >= finished
        finished = modules
        if target.exists():
            break
    if not target.exists():
        made = quantize_to(model, plan, target, "cpu", calibration=calibration, progress=False)
        assert made.continued == finished
    assert sha256_of(target / "packed.safetensors") == sha256_of(whole / "packed.safetensors")


def test_calibration_is_fingerprinted_when_a_scheme_looks_at_it(tmp_path):
    model, facts = save_glm4v(tmp_path / "glm4v"), []
    for number, items in enumerate((2, 2, 3)):
        settings = CalibrationSettings(items=items)
        made = quantize_to(model, "gptq", tmp_path / str(number), "cpu", calibration=settings, progress=False)
        facts.append(Manifest.read(made.folder).calibration)
    assert facts[0]["source"] == "2 PhoneTap calibration items with their answers, none spoken, standard set"
    assert [one["batches"] for one in facts] == [2, 2, 3]
    assert facts[0] == facts[1]
    assert facts[0]["sha256"] != facts[2]["sha256"]
    restored = load(tmp_path / "0", device="cpu", progress=False)
    assert torch.equal(logits(restored), logits(load(tmp_path / "1", device="cpu", progress=False)))
    assert restored.generate(HELLO, max_new_tokens=2).completion_tokens == 2
    assert "2 batches, SHA-256" in (tmp_path / "0/README.md").read_text()


def test_language_models_are_calibrated_on_text(model, tmp_path, capsys):
    common = ("quantize", model, "--plan", "gptq", "--device", "cpu", "--output", tmp_path / "q")
    code, _, err = run(capsys, *common)
    assert (
        code,
        "llama takes no images, and calibration items are screens: give --calibration-text" in err,
    ) == (2, True)
    text = tmp_path / "text.txt"
    code, _, err = run(capsys, *common, "--calibration-text", text)
    assert (code, "text.txt cannot be read: No such file" in err) == (2, True)
    text.write_text(" ")
    code, _, err = run(capsys, *common, "--calibration-text", text)
    assert (code, "has 1 tokens, fewer than one sequence" in err) == (2, True)
    text.write_text("The quick brown fox. " * 60)
    code, _, err = run(capsys, *common, "--calibration-text", text, "--calibration-items", 3)
    assert code == 0, err
    facts = Manifest.read(tmp_path / "q").calibration
    assert facts["source"] == "3 sequences of 256 tokens of text.txt"
    assert facts["batches"] == 3


def test_a_comparison_measures_the_folder_beside_its_unquantized_model(tmp_path):
    from labkit.measure.job import prepare

    model = save_glm4v(tmp_path / "glm4v")
    folder = quantize_to(model, "int4", tmp_path / "glm4v-int4", "cpu", progress=False).folder
    options = {
        "seed": None, "split": "typed", "device": "cpu", "threads": 1, "enable_thinking": False, "batch_size": 1,
    }  # fmt: skip
    job = prepare(folder, None, 1, **options)
    requests = {name: job.request(name, tmp_path / "out") for name in job.plans}
    assert {name: (one["model_source"], one["definition"]) for name, one in requests.items()} == {
        "fp32": (str(model), QuantizationPlan.preset("fp32").to_dict()),
        "int4": (str(folder), Manifest.read(folder).plan),
    }
    assert (job.reference, job.added_plan, job.settings["model"]) == ("fp32", "fp32", "glm4v-int4")
    assert list(prepare(folder, ["bf16", "int4"], 1, **options).plans) == ["bf16", "int4"]
    with pytest.raises(LabError, match=r"by the plan int4; it cannot be loaded under int8"):
        prepare(folder, ["fp32", "int8"], 1, **options)
    (model / "config.json").write_text((model / "config.json").read_text() + " ")
    with pytest.raises(LabError, match=r"unquantized glm4v, which it was made of: .* has changed since"):
        prepare(folder, None, 1, **options)
    model.rename(tmp_path / "gone")
    with pytest.raises(
        LabError, match=r"unquantized glm4v, which it was made of: the folder .* does not exist"
    ):
        prepare(folder, None, 1, **options)
