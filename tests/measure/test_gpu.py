"""The figures of `labkit bench-gpu`, made on the CPU at tiny size: what is recorded, kept, continued and shown."""

import json

import pytest
import tiny_models
import torch

from labkit.cli.main import build_parser, main
from labkit.common.errors import LabError
from labkit.engine.forward import Forward
from labkit.engine.kv_cache import SINKS, keeping_of
from labkit.engine.step_gpu.captured import CapturedStep
from labkit.measure import gpu, gpu_worker
from labkit.plans.plan import QuantizationPlan, RuntimeOptions
from labkit.results.gpu import (
    CAPTURED,
    HEADERS,
    MODULES,
    Decoding,
    GpuRecord,
    Prompt,
    load_records,
    prompt_table,
    table,
)


class FakeEngine:
    """A tiny Glm4v and its static step in plain torch."""

    def __init__(self, **runtime):
        self.model = tiny_models.glm4v()
        self.plan = QuantizationPlan("tiny", (), runtime=RuntimeOptions(**runtime))
        self.forward = Forward(
            self.model,
            keeping_of(self.plan.runtime),
            lambda model, keeping: (CapturedStep(model, keeping, plain=True), ""),
        )
        self.route, self.load_s, self.resolved = self.forward.route, 1.0, None
        self.device, self.dtype = torch.device("cpu"), torch.float32


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(gpu, "COPY_BYTES", 2**16)
    monkeypatch.setattr(gpu, "STEPS", 2)
    monkeypatch.setattr(gpu, "SCREEN_GRID", (1, 4, 4))


@pytest.mark.usefixtures("quick")
def test_every_figure_is_measured_once_and_saved(tmp_path, monkeypatch):
    engine = FakeEngine()
    record = GpuRecord("tiny", "fp32", {}, weights="random")
    bench = gpu.GpuBench(engine, record, lambda: record.save(tmp_path))
    bench.run([1, 3], [40, 70], [33], 64)
    found = load_records(tmp_path)[0]
    assert found == record
    assert [(one.route, one.batch, one.context) for one in found.decoding] == [
        (CAPTURED, 1, 40), (CAPTURED, 3, 40), (CAPTURED, 1, 70), (CAPTURED, 3, 70), (MODULES, 1, 40),
    ]  # fmt: skip
    assert found.agreement["relative_error"] < 1e-5
    assert found.agreement["in_company"] < 1e-5
    assert found.agreement["same_token"] == 1
    assert found.screenshot["tokens"] == 64
    assert [one.tokens for one in found.prompts] == [33]
    text = engine.model.get_decoder()
    weights = sum(one.nbytes for one in (*text.layers.parameters(), *engine.model.lm_head.parameters()))
    caches = 3 * 70 * 2 * 2 * 2 * 32 * 4  # rows, tokens, k and v, layers, groups, width, bytes
    assert found.decoded(3, 70).read_bytes == weights + caches
    # the same again measures nothing
    monkeypatch.setattr(Forward, "prefill", None)
    monkeypatch.setattr(CapturedStep, "step", None)
    again = gpu.GpuBench(engine, found, lambda: None)
    again.run([1, 3], [40, 70], [33], 64)
    assert found == record


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("runtime", "tokens", "each"),
    [({"kv_cache": "int8"}, 70, 32 + 2), ({"kv_cache": "int8", "sliding_window": 20}, 20 + SINKS, 32 + 2)],
)
def test_a_plans_cache_is_kept_by_both_routes_and_counted(runtime, tokens, each):
    engine = FakeEngine(**runtime)
    record = GpuRecord("tiny", "fp32", {}, weights="random")
    gpu.GpuBench(engine, record, lambda: None).run([1], [70], [], 0)
    assert record.agreement["relative_error"] < 1e-5
    text = engine.model.get_decoder()
    weights = sum(one.nbytes for one in (*text.layers.parameters(), *engine.model.lm_head.parameters()))
    for route in (CAPTURED, MODULES):
        assert record.decoded(1, 70, route).read_bytes == weights + tokens * 2 * 2 * 2 * each


@pytest.mark.usefixtures("quick")
def test_what_does_not_fit_is_noted_and_the_rest_goes_on(monkeypatch):
    engine = FakeEngine()
    record = GpuRecord("tiny", "fp32", {})
    bench = gpu.GpuBench(engine, record, lambda: None)
    whole = bench._row

    def row(forward, context, seed):
        if context == 70:
            raise torch.OutOfMemoryError("no")
        return whole(forward, context, seed)

    monkeypatch.setattr(bench, "_row", row)
    bench.run([1], [40, 70], [], 0)
    assert record.notes == ["1 x 70 tokens, captured: the GPU's memory does not suffice"]
    assert record.decoded(1, 40) is not None


def test_tables_say_what_part_of_the_roof_is_reached():
    record = GpuRecord("m", "int4", {}, weights_bytes=10**9, copy_bytes_per_s=1e12)
    record.decoding.append(Decoding(CAPTURED, 1, 1024, [0.004, 0.003, 0.005], 0.002, 10**9, 2 * 10**9))
    record.prompts.append(Prompt(1024, [0.05, 0.04, 0.06], 3 * 10**9))
    record.screenshot = {"tokens": 4096, "peak_bytes": 4 * 10**9}
    line = dict(zip(HEADERS, table([record])[0]))
    assert line["Step, ms"] == "4.00"
    assert line["Floor, ms"] == "1.00"
    assert line["Of the roof"] == "50%"
    assert prompt_table([record]) == [
        ["int4", "1,024", "50.0", "3.00"],
        ["int4", "4,096 with a screenshot", "", "4.00"],
    ]


def test_files_of_another_kind_are_refused(tmp_path):
    with pytest.raises(LabError, match="no records"):
        load_records(tmp_path)
    (tmp_path / "x.json").write_text(json.dumps({"plan": "x"}))
    with pytest.raises(LabError, match="no record of labkit bench-gpu"):
        load_records(tmp_path)


def test_schemes_that_calibrate_get_stand_ins_of_the_same_bytes():
    plan, said = gpu_worker.uncalibrated(QuantizationPlan.from_yaml("article"))
    assert not any(rule.scheme.requires_calibration for rule in plan.rules)
    decoder = next(rule for rule in plan.rules if rule.roles == ("decoder",))
    assert (decoder.scheme.name, decoder.scheme.group_size) == ("int4", 128)
    assert "int4 stands for gptq" in said[0]
    plan = QuantizationPlan.from_yaml("int4")
    assert gpu_worker.uncalibrated(plan) == (plan, [])


def test_numbers_are_checked(tmp_path, capsys):
    given = ["bench-gpu", "pocket", "--output", str(tmp_path)]
    options = build_parser().parse_args([*given, "--batches", "1, 8"])
    assert options.batches == (1, 8)
    for text in ("", "0", "1,x"):
        assert main([*given, "--batches", text]) == 2
        assert "--batches" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_without_a_gpu_the_command_says_so(tmp_path, capsys):
    assert (
        main(["bench-gpu", "autoglm-phone-9b", "--weights", "random", "--output", str(tmp_path / "x")]) == 2
    )
    assert "there is no usable GPU here" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
    assert main(["bench-gpu", "pocket", "--output", str(tmp_path), "--contexts", "0"]) == 2
    assert "--contexts: must be at least 1" in capsys.readouterr().err


@pytest.mark.usefixtures("quick")
def test_the_worker_continues_the_plans_file_and_says_that_it_has_finished(tmp_path, monkeypatch):
    from labkit.loading import load as loading

    monkeypatch.setattr(loading, "load", lambda *given, **options: FakeEngine())
    record = {"model": "tiny", "plan": "fp32", "definition": {}, "weights": "random"}
    amounts = {"batches": [1], "contexts": [40], "prompts": [], "screenshot": 0}
    request, events = {"record": record, "source": "fp32", "folder": str(tmp_path), **amounts}, []
    gpu_worker.run(request, events.append)
    (first,) = load_records(tmp_path)
    assert [step.route for step in first.decoding] == [CAPTURED, MODULES]
    assert first.environment["packages"]["torch"]
    gpu_worker.run({**request, "prompts": [33]}, events.append)
    (second,) = load_records(tmp_path)
    assert (second.decoding, len(second.prompts)) == (first.decoding, 1)
    assert events == [{"event": "finished"}] * 2
