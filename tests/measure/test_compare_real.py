"""The whole way with real parts: a tiny pocket model, real plans, real items, real processes."""

import json
import subprocess
import sys

import pytest
import tiny_models

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
    assert set(body) == {"environment", "measurements"}
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
