"""The whole way with real parts: a tiny pocket model, real plans, real items, real processes."""

import json
import subprocess
import sys

import pytest
import tiny_models

import labkit.measure.compare as compare_module
from labkit.loading.quantize_to import quantize_to
from labkit.measure.anatomy import dissect
from labkit.plans.plan import QuantizationPlan
from labkit.results.comparison import Comparison
from labkit.results.measurement import Measurement


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    model, processor = tiny_models.pocket()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def compare(tiny, output, *arguments):
    command = [
        sys.executable,
        "-m",
        "labkit",
        "compare",
        str(tiny),
        "--threads",
        "1",
        "--output",
        str(output),
    ]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_comparison_of_real_plans(tiny, tmp_path):
    done = compare(tiny, tmp_path / "out", "--plans", "int8,int4", "--items", "6", "--batch-size", "3")
    assert done.returncode == 0, done.stderr
    assert "fp32 was added" in done.stdout
    comparison = Comparison.load(tmp_path / "out")
    fp32, int8, int4 = comparison.measurements
    assert [m.plan for m in comparison.measurements] == ["fp32", "int8", "int4"]
    assert fp32.weights_bytes > int8.weights_bytes > int4.weights_bytes
    for m in comparison.measurements:
        assert isinstance(m, Measurement)
        assert m.weights_bytes == sum(m.bytes_by_role.values())
        assert m.peak_memory_kind == "process peak RSS"
        assert m.peak_memory_bytes > m.weights_bytes
        assert 0 < m.ttft_s <= m.answer_s
        assert [record["split"] for record in m.samples["items"]] == ["typed", "spoken", "hard"] * 2
        assert m.environment["threads"] == 1
    body = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(body) == {"settings", "environment", "added_plan", "measurements"}
    assert body["environment"]["packages"]["torch"]

    again = compare(
        tiny, tmp_path / "out", "--plans", "int8,int4", "--items", "6", "--seed", "1", "--batch-size", "3"
    )
    assert again.returncode == 2
    assert "seed was null, now 1" in again.stderr


@pytest.mark.slow
def test_what_cannot_work_is_refused_before_anything_is_measured(tiny, tmp_path):
    plan = tmp_path / "odd.yaml"
    plan.write_text("name: odd\nrules:\n  - role: decoder\n    scheme: int4\n    group_size: 60\n")
    done = compare(tiny, tmp_path / "out", "--plans", f"fp32,{plan}", "--items", "6")
    assert done.returncode == 2
    assert done.stderr.startswith("labkit: ")
    assert "odd" in done.stderr
    assert "60" in done.stderr
    assert not (tmp_path / "out").exists()


RULES = "name: mine\ndefault: fp32\nrules:\n  - role: decoder\n    scheme: {}\n"


@pytest.mark.slow
def test_a_plan_is_measured_as_it_was_read_though_its_file_changes_meanwhile(tiny, tmp_path, monkeypatch):
    file, measured = tmp_path / "mine.yaml", []
    file.write_text(RULES.format("int8"))
    original = compare_module.run_worker

    def edit_afterwards(request, **options):
        original(request, **options)
        measured.append(request["plan"])
        file.write_text(RULES.format("int4"))

    monkeypatch.setattr(compare_module, "run_worker", edit_afterwards)
    found = compare_module.compare(
        str(tiny), ["fp32", file], 1, weights="random", device="cpu", threads=1, progress=False
    )
    assert measured == ["fp32", "mine"]
    mine = found.measurements[1]
    assert mine.plan_definition["rules"][0]["scheme"] == "int8"
    bytes_of = {
        name: dissect(tiny, QuantizationPlan.from_dict({**mine.plan_definition, "rules": [rule]})).bytes
        for name in ("int8", "int4")
        for rule in [{"role": "decoder", "scheme": name}]
    }
    assert mine.weights_bytes == bytes_of["int8"] != bytes_of["int4"]


@pytest.mark.slow
def test_a_quantized_folder_that_is_made_anew_meanwhile_is_not_measured_under_its_old_plan(
    tiny, tmp_path, monkeypatch
):
    folder = quantize_to(tiny, "int8", tmp_path / "q", "cpu", progress=False).folder
    original = compare_module.run_worker

    def make_anew_afterwards(request, **options):
        original(request, **options)
        quantize_to(tiny, "int4", folder, "cpu", force=True, progress=False)

    monkeypatch.setattr(compare_module, "run_worker", make_anew_afterwards)
    found = compare_module.compare(str(folder), None, 1, device="cpu", threads=1, progress=False)
    assert [m.plan for m in found.measurements] == ["fp32"]
    assert "quantized already, by the plan int4; it cannot be loaded under int8" in found.failures["int8"]
