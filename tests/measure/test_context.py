"""`labkit context`: the same requests behind a longer beginning, each plan against the first."""

import json
import weakref

import pytest
import tiny_models

from labkit import phonetap
from labkit.cli.main import main
from labkit.common.errors import LabError
from labkit.measure import context as growth
from labkit.measure.context import LongItem, measure_growth


@pytest.fixture(scope="module")
def only_config(tmp_path_factory):
    config = tiny_models.glm4v_config().to_dict() | {"architectures": ["Glm4vForConditionalGeneration"]}
    folder = tmp_path_factory.mktemp("only-config")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def tiny_pocket(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny-pocket")
    model, processor = tiny_models.pocket()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_a_longer_item_asks_the_same_behind_its_filler():
    item = phonetap.items(split="typed", count=1)[0]
    fields = {name: getattr(item, name) for name in type(item).__dataclass_fields__}
    (turn,) = LongItem(**fields, filler="....").messages()
    assert turn["content"][0] == {"type": "text", "text": "...."}
    assert turn["content"][1:] == item.messages()[0]["content"]


def test_plans_and_windows_are_measured_at_every_context_and_paired(tiny_pocket, tmp_path):
    given = {"windows": [230], "contexts": [320, 200], "items": 3, "progress": False, "device": "cpu"}
    found = measure_growth(tiny_pocket, ["bf16", "int8-kv"], output=tmp_path, **given)
    assert json.loads((tmp_path / "context.json").read_text())["records"] == found.records
    by = {(one["plan"], one["context"]): one for one in found.records}
    assert list(by) == [(p, c) for p in ("bf16", "int8-kv", "bf16-window-230") for c in (200, 320)]
    for (plan, context), one in by.items():
        assert one["prompt_tokens"] == pytest.approx(context, abs=8)
        assert one["cache_bytes"] == one["predicted_cache_bytes"] > 0
        assert len(one["samples"]["token_s"]) == 4 * 23
        assert one["items"] == 3
        assert ("paired" in one) == (plan != "bf16")
    whole, int8, window = (by[plan, 320] for plan in ("bf16", "int8-kv", "bf16-window-230"))
    assert int8["cache_bytes"] / whole["cache_bytes"] == pytest.approx(0.5, abs=0.05)
    assert window["cache_bytes"] / whole["cache_bytes"] == pytest.approx(234 / 384, rel=0.01)
    assert by["bf16-window-230", 200]["cache_bytes"] < by["bf16", 200]["cache_bytes"]
    headers, rows = found.rows()
    assert len(rows) == 6
    assert all(len(row) == len(headers) for row in rows)
    again = measure_growth(tiny_pocket, ["bf16", "int8-kv"], output=tmp_path, **{**given, "contexts": [200]})
    assert [one["samples"] for one in again.records] == [by[p, 200]["samples"] for p, c in by if c == 200]


def test_no_model_of_a_plan_before_is_there_when_the_next_is_loaded(tiny_pocket, tmp_path, monkeypatch):
    models, load = [], growth.load

    def watched(*args, **options):
        assert [one() for one in models] == [None] * len(models)
        engine = load(*args, **options)
        engine.model.__dict__["itself"] = engine.model  # as a captured step refers to what it is part of
        models.append(weakref.ref(engine.model))
        return engine

    monkeypatch.setattr(growth, "load", watched)
    measure_growth(
        tiny_pocket, ["fp32", "int8", "int8-kv"], contexts=[200], items=0, device="cpu", output=tmp_path,
        progress=False,
    )  # fmt: skip
    assert len(models) == 3


def test_random_weights_are_measured_for_cost_alone(only_config, tmp_path, capsys):
    given = [
        "--weights",
        "random",
        "--plans",
        "int4",
        "--contexts",
        "200",
        "--prompts",
        "1",
        "--device",
        "cpu",
    ]
    assert main(["context", str(only_config), *given, "--output", str(tmp_path)]) == 0
    assert "contexts: [200]" in (tmp_path / "config.yaml").read_text()
    printed = capsys.readouterr().out
    assert "int4 (random weights)" in printed
    assert "Right steps" not in printed
    (record,) = json.loads((tmp_path / "context.json").read_text())["records"]
    assert record["weights"] == "random"
    assert record["prompt_tokens"] == 200
    assert "step_success_rate" not in record


def test_what_cannot_be_measured_is_refused(tiny_pocket, tmp_path, capsys):
    for contexts, message in (
        ([], "whole numbers of tokens"),
        ([0], "from 1 on"),
        ([10**6], "tokens, and the"),
    ):
        with pytest.raises(LabError, match=message):
            measure_growth(tiny_pocket, ["bf16"], contexts=contexts, output=tmp_path / "x", progress=False)
    assert main(["context", "pocket", "--windows", "many"]) == 2
    assert "must be a whole number, not 'many'" in capsys.readouterr().err
