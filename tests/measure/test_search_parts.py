"""The small parts of sensitivity and search: goals, candidates, record folders, datasets, charts."""

import json

import pytest
import tiny_models
import torch

from labkit.common.errors import LabError
from labkit.common.formats import bytes_of
from labkit.loading.datasets import PROBE_SEED, VALIDATION_SEED, Datasets
from labkit.measure.search.goal import Goal
from labkit.plans.rule import kind_of, layer_of
from labkit.quantization import get_scheme
from labkit.quantization.shorthand import label_of, parse_candidate, parse_candidates
from labkit.results.charts.methods import column_errors, label_sides, pareto_front, sensitivity_heat_map
from labkit.results.folders import RecordFolder


@pytest.mark.parametrize(
    ("text", "size"),
    [("60MB", 60_000_000), ("5.5 GB", 5_500_000_000), ("2KiB", 2048), ("100B", 100), (7, 7), ("1gib", 2**30)],
)
def test_amounts_of_memory_are_read(text, size):
    assert bytes_of(text) == size


@pytest.mark.parametrize("text", ["", "MB", "60 bananas", "-3MB", "0", "0GB", "1e6", "100"])
def test_what_is_no_amount_is_refused(text):
    with pytest.raises(LabError, match=r"written 60MB or 5\.5GB"):
        bytes_of(text)


def test_a_number_without_a_unit_is_asked_for_it():
    with pytest.raises(LabError, match=r"5\.5GB, not '12'; 12GB\?"):
        bytes_of("12")


def test_a_goal_is_one_of_three():
    assert Goal.of("20MB", None, None).label == "20MB"
    assert Goal.of("5.5GB", None, None).label == "5.5GB"
    assert Goal.of(None, 4.5, None).label == "4.5bit"
    assert Goal.of(None, None, 0.5).label == "loss-0.5"
    assert Goal.of(None, None, 0.0).settings() == {"max_loss": 0.0}
    for several in ((None, None, None), ("1MB", 4.5, None), (None, 4.5, 0.5)):
        with pytest.raises(LabError, match="give one goal"):
            Goal.of(*several)
    with pytest.raises(LabError, match="bits must be between 1 and 32"):
        Goal.of(None, 0.5, None)
    with pytest.raises(LabError, match="between 0 and 100"):
        Goal.of(None, None, -1)


@pytest.mark.parametrize(
    ("text", "scheme"),
    [
        ("int8", get_scheme("int8")),
        ("gptq-3bit", get_scheme("gptq", num_bits=3)),
        ("awq-4bit:group_size=32,symmetric=true", get_scheme("awq", group_size=32, symmetric=True)),
        ("int8-dynamic:smoothing=rms", get_scheme("int8-dynamic", smoothing="rms")),
        ("llm-int8:outlier_threshold=5.0", get_scheme("llm-int8", outlier_threshold=5.0)),
    ],
)
def test_candidates_are_read_and_written(text, scheme):
    assert parse_candidate(text) == scheme
    assert label_of(scheme) == text


def test_several_candidates_in_one_text():
    found = parse_candidates("int8,awq-4bit:group_size=32,symmetric=true,gptq-2bit")
    assert list(found) == ["int8", "awq-4bit:group_size=32,symmetric=true", "gptq-2bit"]
    assert list(parse_candidates("int8; gptq-2bit")) == ["int8", "gptq-2bit"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("int5", "unknown scheme 'int5'; known are"),
        ("gptq-5bit", "num_bits of scheme gptq must be one of"),
        ("int8-3bit", "unknown option 'num_bits' of scheme int8"),
        ("gptq:group_size", "an option is written name=value"),
        ("a b", "names no scheme"),
        ("", "no candidate scheme"),
    ],
)
def test_wrong_candidates_say_what_is_wrong(text, message):
    with pytest.raises(LabError, match=message):
        parse_candidates(text)


def test_names_tell_layer_and_kind():
    assert layer_of("model.layers.12.mlp.up_proj") == ("model.layers", 12)
    assert layer_of("lm_head") is None
    assert kind_of("model.layers.12.mlp.up_proj") == "up_proj"
    assert kind_of("experts.3") == "experts"


def test_records_are_kept_and_half_a_line_is_dropped(tmp_path):
    folder = RecordFolder(tmp_path / "new", "things")
    folder.open({"a": 1})
    folder.append({"n": 1})
    folder.append({"n": 2}, stream=2)
    with (folder.path / "records.2.jsonl").open("a") as file:
        file.write('{"n": 3')
    again = RecordFolder(folder.path, "things")
    again.open({"a": 1})
    assert sorted(one["n"] for one in again.records()) == [1, 2]
    again.append({"n": 4}, stream=2)
    assert sorted(one["n"] for one in again.records()) == [1, 2, 4]


def test_a_list_may_grow_and_nothing_else_may(tmp_path):
    folder = RecordFolder(tmp_path, "things")

    def kept():
        return json.loads((tmp_path / "settings.json").read_text())

    folder.open({"a": 1, "list": ["x", "y"]}, grows="list")
    folder.open({"a": 1, "list": ["z", "x"]}, grows="list")
    assert kept() == {"a": 1, "list": ["x", "y", "z"]}
    folder.open({"a": 1, "list": ["y"]}, grows="list")
    assert kept() == {"a": 1, "list": ["x", "y", "z"]}
    with pytest.raises(LabError, match="another kind: a was 1, now 2"):
        folder.open({"a": 2, "list": ["x"]}, grows="list")
    with pytest.raises(LabError, match="list was"):
        folder.open({"a": 1, "list": ["y"]})
    assert kept() == {"a": 1, "list": ["x", "y", "z"]}


def test_a_folder_of_something_else_is_refused(tmp_path):
    RecordFolder(tmp_path, "things").open({"a": 1, "b_fingerprint": "x"})
    with pytest.raises(LabError, match="holds things of another kind: a was 1, now 2; give another"):
        RecordFolder(tmp_path, "things").open({"a": 2, "b_fingerprint": "x"})
    with pytest.raises(LabError, match="the b changed in content"):
        RecordFolder(tmp_path, "things").open({"a": 1, "b_fingerprint": "y"})
    (tmp_path / "records.jsonl").write_text("no\n")
    with pytest.raises(LabError, match=r"records\.jsonl: damaged in line 1"):
        RecordFolder(tmp_path, "things").records()
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(LabError, match=r"settings\.json is damaged"):
        RecordFolder(tmp_path, "things").open({"a": 1})
    (tmp_path / "settings.json").unlink()
    with pytest.raises(LabError, match="holds other files"):
        RecordFolder(tmp_path, "things").open({"a": 1})
    (tmp_path / "file").touch()
    with pytest.raises(LabError, match="cannot be written"):
        RecordFolder(tmp_path / "file", "things").open({"a": 1})


def test_a_texts_parts_do_not_overlap(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{number:05d} " for number in range(2000)))
    words = tiny_models.tokenizer()
    datasets = Datasets(calibration=4, probe=3, validation=2, text=str(text), length=30)
    found = {name: datasets.sequences(words, name) for name in ("calibration", "probe", "validation")}
    assert {name: tuple(ids.shape) for name, ids in found.items()} == {
        "calibration": (4, 30), "probe": (3, 30), "validation": (2, 30),
    }  # fmt: skip
    seen = [set(words.decode(ids.flatten()).split()) for ids in found.values()]
    assert all(seen)
    assert not seen[0] & seen[1]
    assert not seen[1] & seen[2]
    short = Datasets(text=str(text), length=5000)
    with pytest.raises(LabError, match=r"its part for probe has .* tokens, fewer than one sequence of 5000"):
        short.sequences(words, "probe")


def test_items_for_different_purposes_are_different_and_never_test_items():
    datasets = Datasets(probe=6, validation=6)
    probe, validation = (datasets.items(name, ("image", "audio")) for name in ("probe", "validation"))
    assert PROBE_SEED != VALIDATION_SEED
    assert not {item.id for item in probe} & {item.id for item in validation}
    assert all(item.id.startswith("calibration-") for item in (*probe, *validation))
    assert Datasets(validation=0).items("validation", ("image",)) == []


def test_data_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(LabError, match="takes no images, so PhoneTap cannot judge it: give a file of plain"):
        Datasets().check("tiny", ())
    with pytest.raises(LabError, match=r"nowhere\.txt cannot be read"):
        Datasets(text=str(tmp_path / "nowhere.txt")).check("tiny", ())
    with pytest.raises(LabError, match="probe must be a whole number of at least 1, not 0"):
        Datasets(probe=0)


def linears():
    return [
        {
            "linear": f"model.layers.{layer}.{kind}", "role": "decoder", "kind": kind, "depth": (layer + 0.5) / 3,
            "scheme": scheme, "parameters": 10, "bytes": 5, "kl": 10.0 ** -(layer + 1), "agreement": 1.0,
            "sqnr_db": 20.0 + layer,
        }
        for layer in range(3)
        for kind in ("up", "down")
        for scheme in ("int8", "gptq-4bit")
    ]  # fmt: skip


def test_the_heat_map_shows_each_linear_once_under_each_scheme():
    head = {**linears()[0], "linear": "lm_head", "kind": "lm_head", "depth": None, "role": "lm_head"}
    chart = sensitivity_heat_map(
        [*linears(), head, {**head, "scheme": "nf4", "unsupported": "no"} | {"kl": 1.0}]
    )
    assert len(chart.data) == 3
    first = chart.data[0]
    assert list(first.y) == ["decoder · up", "decoder · down", "lm_head · lm_head"]
    assert [round(value) for value in first.z[0]] == [-1, -2, -3]
    assert "KL 0.1 nats" in first.text[0][0]
    assert [button["label"] for button in chart.layout.updatemenus[0].buttons] == ["int8", "gptq-4bit", "nf4"]
    assert json.loads(chart.to_json())
    assert sensitivity_heat_map(linears(), "sqnr_db").data[0].z[1][2] == 22.0


def test_the_front_and_the_measured_plans_are_drawn():
    measured = [
        {"plan": "int4", "bytes": 2e6, "kl": 0.1},
        {"plan": "found", "bytes": 2e6, "kl": 0.01, "searched": True, "step_success_rate": 0.9},
    ]
    chart = pareto_front([{"bytes": 4e6, "kl": 0.0}, {"bytes": 1e6, "kl": 0.5}], measured)
    assert list(chart.data[0].x) == [1.0, 4.0]
    assert chart.data[2].marker.symbol == "star"
    assert "90.0% right steps" in chart.data[2].hovertemplate


def test_names_of_plans_that_lie_close_do_not_meet():
    near = [
        {"plan": name, "bytes": 32e6, "kl": kl} for name, kl in (("a", 2.2e-5), ("b", 2.7e-5), ("c", 9e-4))
    ]
    assert label_sides(near) == {"a": "middle right", "b": "middle left", "c": "middle right"}
    found = {"plan": "found", "bytes": 27e6, "kl": 9e-6, "searched": True}
    assert label_sides([*near, found])["found"] == "bottom center"


def test_errors_of_columns_are_summed_up():
    chart = column_errors({"one": torch.tensor([1.0, 2.0, 3.0]), "two": [0.5, 0.5]})
    assert list(chart.data[0].y) == [1.0, 3.0, 6.0]
    assert [line.name for line in chart.data] == ["one", "two"]


def test_what_is_shipped_of_a_search_fits_the_shipped_model():
    from labkit.common.files import assets_folder
    from labkit.measure.anatomy import dissect
    from labkit.measure.search.layerwise import measurable_linears, measurable_others
    from labkit.measure.search.result import Search
    from labkit.measure.search.sensitivity import Sensitivity

    pocket = dissect("pocket")
    results = assets_folder() / "results"
    sensitivity = Sensitivity.load(results / "pocket-sensitivity")
    measured = {one["linear"] for one in sensitivity.linears}
    assert measured == {*measurable_linears(pocket.skeleton), *measurable_others(pocket.skeleton)}
    search = Search.load(results / "pocket-search")
    assert pocket.under(search.plan).bytes == search.found["bytes"]
    article = next(one for one in search.others if one["plan"] == "article")
    assert search.found["bytes"] <= article["bytes"] == pocket.under("article").bytes
    assert search.found["kl"] < article["kl"]
    assert all(one["packages"]["torch"] for found in (sensitivity, search) for one in found.environments)
    assert sensitivity.environments
    assert search.environments
