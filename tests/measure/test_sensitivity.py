"""Sensitivity and search on a tiny language model: complete, resumable, and the plan found is a plan."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_models
import torch
from safetensors.torch import load_file

from labkit.common.errors import LabError
from labkit.loading.datasets import Datasets
from labkit.measure.evaluator import PlanEvaluator
from labkit.measure.search import search as search_module
from labkit.measure.search import solver
from labkit.measure.search.result import Search
from labkit.measure.search.search import search_plan
from labkit.measure.search.sensitivity import Sensitivity, measure_sensitivity
from labkit.plans.plan import QuantizationPlan
from labkit.plans.quantize import quantize_
from labkit.quantization.shorthand import parse_candidates

ROOT = Path(__file__).resolve().parents[2]
SCHEMES = "gptq-3bit:group_size=32,int4-8bit:group_size=32,nf4:group_size=1024"


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny-llama")
    tiny_models.llama().to(torch.bfloat16).save_pretrained(folder)
    tiny_models.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text((ROOT / "LICENSE").read_text(encoding="utf-8"), encoding="utf-8")
    return Datasets(calibration=6, probe=4, validation=4, text=str(text), length=64)


def measured(folder, datasets, output, schemes=SCHEMES, **options):
    options = {"jobs": 1, "threads": 1, "progress": False, **options}
    return measure_sensitivity(folder, schemes, datasets=datasets, output=output, **options)


@pytest.fixture(scope="module")
def sensitivity(llama_folder, datasets, tmp_path_factory):
    output = tmp_path_factory.mktemp("sensitivity")
    return output, measured(llama_folder, datasets, output)


def test_every_linear_is_measured_under_every_candidate(sensitivity):
    output, found = sensitivity
    table = found.table()
    assert len(table) == 15 * 3
    assert set(table["scheme"]) == set(parse_candidates(SCHEMES))
    three, eight = (table[table["scheme"].str.startswith(name)] for name in ("gptq-3bit", "int4-8bit"))
    assert (three["kl"].to_numpy() > 5 * eight["kl"].to_numpy()).all()
    assert (three["sqnr_db"].to_numpy() + 12 < eight["sqnr_db"].to_numpy()).all()
    assert set(table["role"]) == {"decoder", "lm_head"}
    refused = [one for one in found.linears if "unsupported" in one]
    assert len(refused) == 15
    assert "group_size 1024 does not divide 128" in refused[0]["unsupported"]
    parts = found.parts_table()
    assert len(parts) == 2 * 3
    assert Sensitivity.load(output) == found


def test_measuring_again_measures_nothing(sensitivity, llama_folder, datasets):
    output, found = sensitivity
    before = {path.name: path.stat().st_mtime_ns for path in output.glob("records*.jsonl")}
    assert measured(llama_folder, datasets, output) == found
    assert {path.name: path.stat().st_mtime_ns for path in output.glob("records*.jsonl")} == before


def test_records_without_the_probe_get_one(sensitivity, llama_folder, datasets, tmp_path):
    """As where the table alone was kept, and a search wants to go on from it."""
    output = shutil.copytree(sensitivity[0], tmp_path / "copied")
    probe = output / "probe.safetensors"
    before, records = load_file(probe), (output / "records.jsonl").read_bytes()
    probe.unlink()
    assert measured(llama_folder, datasets, output) == sensitivity[1]
    assert all(torch.equal(tensor, before[name]) for name, tensor in load_file(probe).items())
    assert (output / "records.jsonl").read_bytes() == records


def test_parts_come_after_linears_of_the_same_name(sensitivity, llama_folder, datasets, tmp_path):
    """lm_head is both."""
    assert measured(llama_folder, datasets, tmp_path, parts=False).parts == []
    found = measured(llama_folder, datasets, tmp_path)
    assert [(one["part"], one["scheme"]) for one in found.parts] == [
        (one["part"], one["scheme"]) for one in sensitivity[1].parts
    ]


def test_two_processes_find_what_one_finds(sensitivity, llama_folder, datasets, tmp_path):
    both = measured(llama_folder, datasets, tmp_path, jobs=2, parts=False)
    assert len(list(tmp_path.glob("worker-*.log"))) == 2
    for one, other in zip(both.linears, sensitivity[1].linears, strict=True):
        assert one["linear"] == other["linear"]
        assert one.get("kl", 0) == pytest.approx(other.get("kl", 0), rel=1e-3, abs=1e-8)


def test_further_candidates_are_added_to_what_is_there(sensitivity, llama_folder, datasets, tmp_path):
    output = shutil.copytree(sensitivity[0], tmp_path / "grown")
    before = (output / "records.jsonl").read_text()
    found = measured(llama_folder, datasets, output, schemes=f"{SCHEMES},int8", parts=False)
    added = (output / "records.jsonl").read_text().removeprefix(before).splitlines()
    assert {json.loads(line)["scheme"] for line in added} == {"int8"}
    assert len(found.linears) == len(sensitivity[1].linears) + len(added)
    fewer = measured(llama_folder, datasets, output, schemes="int8", parts=False)
    assert fewer.linears == [one for one in found.linears if one["scheme"] == "int8"]
    assert measured(llama_folder, datasets, output).linears == sensitivity[1].linears


def test_other_settings_need_another_folder(sensitivity, llama_folder, datasets):
    other = replace(datasets, probe=datasets.probe + 1)
    with pytest.raises(LabError, match="sensitivities of another kind: material was"):
        measured(llama_folder, other, sensitivity[0])


def test_a_text_model_without_text_is_refused_at_once(llama_folder, tmp_path):
    with pytest.raises(LabError, match="takes no images, so PhoneTap cannot judge it"):
        measure_sensitivity(llama_folder, "int8", output=tmp_path / "new", progress=False)
    assert not (tmp_path / "new").exists()


def command(folder, datasets, output):
    words = [
        "sensitivity",
        str(folder),
        "--schemes",
        SCHEMES,
        "--text",
        datasets.text,
        "--output",
        str(output),
    ]
    for name in ("calibration", "probe", "validation", "length"):
        words += [f"--{name}", str(getattr(datasets, name))]
    return [sys.executable, "-m", "labkit", *words, "--jobs", "1", "--threads", "1"]


@pytest.mark.slow
@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_is_ended_continues_where_it_was(blow, sensitivity, llama_folder, datasets, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    words = command(llama_folder, datasets, tmp_path)
    process = subprocess.Popen(
        words,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    records = tmp_path / "records.jsonl"
    deadline = time.monotonic() + 120
    while not (records.exists() and records.read_bytes().count(b"\n") >= 5):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(blow)
    _, errors = process.communicate(timeout=60)
    if blow == signal.SIGINT:
        assert process.returncode == 130
        assert re.search(r"interrupted: \d+ of 51 are measured; run the same again to continue", errors)
    time.sleep(0.5)  # a worker whose parent was killed ends at its next event
    kept = records.read_bytes()
    kept = kept[: kept.rfind(b"\n") + 1]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert records.read_bytes().startswith(kept)
    assert "Most sensitive to gptq-3bit:group_size=32" in done.stdout
    assert (tmp_path / "sensitivity.html").stat().st_size > 10_000
    found = Sensitivity.load(tmp_path)
    assert [(one["linear"], one["scheme"]) for one in found.linears] == [
        (one["linear"], one["scheme"]) for one in sensitivity[1].linears
    ]
    assert len(found.parts) == 6


def searched(folder, datasets, sensitivity, output, **options):
    options = {"bits": 5.0, "against": ["int8"], "jobs": 1, "threads": 1, "progress": False, **options}
    return search_plan(
        folder, schemes=SCHEMES, datasets=datasets, sensitivities=sensitivity[0], output=output, **options
    )


@pytest.fixture(scope="module")
def search(sensitivity, llama_folder, datasets, tmp_path_factory):
    output = tmp_path_factory.mktemp("search")
    return output, searched(llama_folder, datasets, sensitivity, output)


def test_the_plan_found_keeps_to_the_budget_and_the_first_choice_beats_guessing(search, sensitivity):
    output, found = search
    model = tiny_models.llama()
    resolved = found.plan.resolve(model)
    linear_bytes = sum(part.bytes for part in resolved.parts if part.is_linear)
    values = sum(part.parameters for part in resolved.parts if part.is_linear)
    assert 4.5 < 8 * linear_bytes / values <= 5.0
    assert resolved.predicted_bytes == found.found["bytes"]
    wide, narrow = "int4-8bit:group_size=32", "gptq-3bit:group_size=32"
    costs = {(one["linear"], one["scheme"]): one["kl"] for one in sensitivity[1].linears if "kl" in one}
    sizes = {name: model.get_submodule(name).weight.numel() for name in resolved.schemes}
    records = map(json.loads, (output / "records.jsonl").read_text().splitlines())
    rounds = [one for one in records if one.get("plan") == "searched-5bit"]
    first = QuantizationPlan.from_dict(rounds[0]["definition"], "first").resolve(model)
    eights = {name for name, scheme in first.schemes.items() if scheme.num_bits == 8}

    def cost(chosen):
        return sum(costs[name, wide if name in chosen else narrow] for name in sizes)

    guesses = []
    for names in (list(sizes), list(reversed(sizes))):  # eight bits for the first, or the last, that fit
        guess, left = set(), sum(sizes[name] for name in eights)
        for name in names:
            if sizes[name] <= left:
                guess.add(name)
                left -= sizes[name]
        guesses.append(cost(guess))
    assert cost(eights) < min(guesses)
    assert found.found["kl"] == pytest.approx(found.found["predicted_kl"], rel=1.0)


def test_apart_the_first_choice_is_at_least_as_good_and_each_linear_gets_its_own(
    search, sensitivity, llama_folder, datasets, tmp_path
):
    found = searched(llama_folder, datasets, sensitivity, tmp_path, apart=True)
    assert found.rounds[0]["predicted_kl"] <= search[1].rounds[0]["predicted_kl"]
    schemes = found.plan.resolve(tiny_models.llama()).schemes
    joined = search[1].plan.resolve(tiny_models.llama()).schemes
    layers = [f"model.layers.{number}.self_attn" for number in range(5)]
    families = [{f"{layer}.{kind}_proj" for kind in "qkv"} for layer in layers]
    families = [family for family in families if family <= schemes.keys()]
    assert any(len({schemes[name] for name in family}) > 1 for family in families)
    assert all(len({joined[name] for name in family}) == 1 for family in families)
    with pytest.raises(LabError, match="apart"):
        searched(llama_folder, datasets, sensitivity, tmp_path, apart=False)


def test_its_file_carries_the_evidence_and_fits_taller_models(search):
    _, found = search
    plan = QuantizationPlan.from_yaml(found.path)
    assert plan.evidence["goal"] == {"bits": 5.0}
    assert [one["plan"] for one in plan.evidence["measured"]] == ["unquantized", "int8", "searched-5bit"]
    assert plan.evidence["measured"][-1]["kl"] == pytest.approx(found.found["kl"], rel=1e-4)
    assert min(one["kl"] for one in plan.evidence["rounds"]) == plan.evidence["measured"][-1]["kl"]
    assert [one["round"] for one in found.rounds] == [*range(1, len(found.rounds) + 1)]
    from transformers import LlamaForCausalLM

    config = tiny_models.llama_config()
    config.num_hidden_layers = 10
    with torch.device("meta"):
        tall = LlamaForCausalLM(config)
    resolved = plan.resolve(tall)
    assert len(resolved.schemes) == 71
    mine = plan.resolve(tiny_models.llama()).schemes
    for layer in range(10):
        name = "model.layers.{}.mlp.down_proj"
        assert resolved.schemes[name.format(layer)] == mine[name.format(layer // 5)]


def test_what_was_measured_is_told_and_kept(search, tmp_path):
    output, found = search
    table = found.table()
    assert list(table.index) == ["unquantized", "int8", "searched-5bit"]
    assert (table["perplexity"] > 1).all()
    assert found.conclusions()[0].startswith("searched-5bit: ")
    assert "int8 (" in found.conclusions()[1]
    moved = shutil.copytree(output, tmp_path / "moved")
    assert replace(Search.load(moved), path=found.path) == found
    assert Search.load(moved).plan == found.plan
    assert str(output) not in (moved / "search.json").read_text()
    assert found.front[0]["bytes"] < found.found["bytes"] < found.front[-1]["bytes"]
    assert len(found.plot().data) == 3
    assert not (output / "work").exists() or not any((output / "work").iterdir())


def test_a_finished_search_measures_nothing_again(search, sensitivity, llama_folder, datasets, monkeypatch):
    output, found = search
    monkeypatch.setattr(PlanEvaluator, "_measure", None)
    again = searched(llama_folder, datasets, sensitivity, output)
    assert again.found == found.found
    assert again.environments == found.environments


def test_what_is_measured_says_where(search, sensitivity):
    for found in (search[1], sensitivity[1]):
        (environment,) = found.environments
        assert environment["packages"]["torch"].startswith("2.")
        assert environment["cores"] >= 1


def test_an_interrupted_search_keeps_what_it_measured(
    sensitivity, llama_folder, datasets, tmp_path, monkeypatch
):
    original, measured_plans = PlanEvaluator._measure, []

    def interrupted(self, plan, *arguments):
        if len(measured_plans) == 2:
            raise KeyboardInterrupt
        measured_plans.append(plan.name)
        return original(self, plan, *arguments)

    monkeypatch.setattr(PlanEvaluator, "_measure", interrupted)
    with pytest.raises(search_module.Interrupted, match="run the same again to continue"):
        searched(llama_folder, datasets, sensitivity, tmp_path)
    assert measured_plans == ["unquantized", "int8"]
    kept = [json.loads(line)["plan"] for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    assert kept == measured_plans
    monkeypatch.setattr(PlanEvaluator, "_measure", original)
    assert Path(searched(llama_folder, datasets, sensitivity, tmp_path).path).is_file()


def test_predictions_are_corrected_where_measuring_disagrees(
    sensitivity, llama_folder, datasets, tmp_path, monkeypatch
):
    monkeypatch.setattr(solver, "AGREEMENT", 1.0001)
    names = []
    original = PlanEvaluator.measure

    def spy(self, plan, *arguments, **options):
        names.append(plan.name)
        return original(self, plan, *arguments, **options)

    monkeypatch.setattr(PlanEvaluator, "measure", spy)
    searched(llama_folder, datasets, sensitivity, tmp_path, against=[])
    assert "searched-5bit: decoder" in names
    assert "searched-5bit: lm_head" in names


def test_the_smallest_plan_within_a_loss(sensitivity, llama_folder, datasets, tmp_path):
    found = searched(llama_folder, datasets, sensitivity, tmp_path, bits=None, max_loss=3.0, against=[])
    reference, perplexity = found.reference["perplexity"], found.found["perplexity"]
    assert perplexity <= reference * 1.03
    assert found.found["bytes"] < 0.5 * found.reference["bytes"]


def test_budgets_that_cannot_be_kept_are_refused_with_what_can(sensitivity, llama_folder, datasets, tmp_path):
    with pytest.raises(LabError, match=r"takes \d\.\d+ bits a value, and 2 are allowed"):
        searched(llama_folder, datasets, sensitivity, tmp_path / "a", bits=2.0)
    with pytest.raises(
        LabError, match=r"smallest plan of these schemes takes \d+ kB, of which .* 50\.0 kB are all"
    ):
        searched(llama_folder, datasets, sensitivity, tmp_path / "b", bits=None, memory="50kB")


def test_the_plan_found_is_laid_on_any_copy_of_the_model(search, datasets):
    _, found = search
    model = tiny_models.llama()
    batches = list(datasets.sequences(tiny_models.tokenizer(), "calibration").split(1))
    resolved = quantize_(model, found.path, batches, progress=False)
    assert resolved.plan == found.plan


KILLED_SEARCH = """
import os, signal, sys
import labkit.measure.evaluator
from labkit.results.folders import RecordFolder
from labkit.plans.finished import WorkFolder

where, number = sys.argv[1], int(sys.argv[2])
calls = 0

def die_at(cls, name):
    original = getattr(cls, name)
    def wrapped(*arguments, **options):
        global calls
        calls += 1
        if calls == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)
    setattr(cls, name, wrapped)

if where == "plan":
    die_at(RecordFolder, "append")
else:
    die_at(WorkFolder, "save")
from labkit.cli.main import main
sys.exit(main(sys.argv[3:]))
"""


@pytest.mark.slow
def test_a_search_that_is_killed_loses_no_plan_and_no_solved_linear(
    search, sensitivity, llama_folder, datasets, tmp_path
):
    output = tmp_path / "search"
    words = ["search", str(llama_folder), "--bits", "5", "--schemes", SCHEMES, "--against", "int8"]
    words += ["--text", datasets.text, "--sensitivities", str(sensitivity[0]), "--output", str(output)]
    for name in ("calibration", "probe", "validation", "length"):
        words += [f"--{name}", str(getattr(datasets, name))]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def run(where, number):
        command = [
            sys.executable,
            "-c",
            KILLED_SEARCH,
            where,
            str(number),
            *words,
            "--jobs",
            "1",
            "--threads",
            "1",
        ]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    def kept():
        records = output / "records.jsonl"
        plans = records.read_bytes().count(b"\n") if records.exists() else 0
        return plans, sorted(path.name for path in output.glob("work/*/*.safetensors"))

    assert run("plan", 3).returncode == -signal.SIGKILL  # after the environment, at the second plan's record
    assert kept()[0] == 1
    killed = run("linear", 5)  # four Linears of a plan solved
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    plans, linears = kept()
    assert plans >= 1
    assert len(linears) == 4
    times = {name: next(output.glob(f"work/*/{name}")).stat().st_mtime_ns for name in linears}
    assert run("linear", 3).returncode == -signal.SIGKILL  # two more
    assert len(kept()[1]) == 6
    assert all(next(output.glob(f"work/*/{name}")).stat().st_mtime_ns == time for name, time in times.items())
    done = run("plan", 99)
    assert done.returncode == 0, done.stderr
    assert Search.load(output).found["kl"] == pytest.approx(search[1].found["kl"], rel=1e-6)
