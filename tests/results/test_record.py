"""Every shipped result is one of a family: read, written, and read again as it was; damage is named."""

import dataclasses
import json
from typing import ClassVar

import pytest

from labkit.common.errors import ResultsError
from labkit.common.files import assets_folder
from labkit.measure.perplexity import Perplexities
from labkit.measure.search.result import Search
from labkit.measure.search.sensitivity import Sensitivity
from labkit.results.comparison import Comparison
from labkit.results.context import ContextGrowth
from labkit.results.fit import FitCheck
from labkit.results.gpu import GpuRecord
from labkit.results.record import COMPACT_FROM, OpenRecord, Record

RESULTS = assets_folder() / "results"
FILES = sorted(path.relative_to(RESULTS).as_posix() for path in RESULTS.rglob("*.json"))
KINDS = {kind.FILE: kind for kind in (Comparison, ContextGrowth, FitCheck, Perplexities, Search, Sensitivity)}
OPEN = {"bench-cpu.json", "gptq-9b.json", "servers.json", "soak.json"}
"""Of scripts that are no command of the lab."""


def kind_of(name):
    folder, _, file = name.rpartition("/")
    if folder == "gpu-9b":
        return GpuRecord
    return {**KINDS, "peers.json": Perplexities, **dict.fromkeys(OPEN, OpenRecord)}[file]


@pytest.mark.parametrize("name", FILES)
def test_what_is_shipped_is_read_and_written_and_read_again(name, tmp_path):
    kind, body = kind_of(name), json.loads((RESULTS / name).read_text(encoding="utf-8"))
    record = kind.load(RESULTS / name)
    assert record.environment or record.environments
    again = kind.load(record.save(tmp_path / record.file_name))
    if kind is Search:  # the plan's file lies beside it
        again = dataclasses.replace(again, path=record.path)
    assert again == record
    if kind is Comparison:
        assert {**record.environment, "settings": record.settings} == {
            name: value
            for name, value in body["environment"].items()
            if name not in ("failures", "added_plan")
        }
        assert [m.plan for m in record.measurements] == [row["plan"] for row in body["measurements"]]
    else:
        kept = record.to_dict()
        assert all(kept[name] == value for name, value in body.items() if value)


@dataclasses.dataclass
class Count(Record):
    FILE: ClassVar[str] = "count.json"
    COMMAND: ClassVar[str] = "count"

    samples: list[float]
    note: str | None = None


def test_a_record_goes_into_a_folder_or_a_file(tmp_path):
    record = Count([1.0, 2.5], settings={"seed": 1})
    assert record.save(tmp_path / "new" / "folder") == tmp_path / "new" / "folder" / "count.json"
    assert record.save(tmp_path / "mine.json") == tmp_path / "mine.json"
    assert Count.load(tmp_path / "new" / "folder") == Count.load(tmp_path / "mine.json") == record
    assert json.loads((tmp_path / "mine.json").read_text()) == {
        "settings": {"seed": 1},
        "samples": [1.0, 2.5],
    }


def test_a_large_record_is_written_compactly(tmp_path):
    small, large = Count([0.5] * 10), Count([0.5] * COMPACT_FROM)
    assert small.save(tmp_path / "small.json").read_text().count("\n") > 10
    assert large.save(tmp_path / "large.json").read_text().count("\n") == 1
    assert Count.load(tmp_path / "large.json") == large


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "damaged"),
        ("[]", "field 'samples' is missing"),
        ("{}", "field 'samples' is missing"),
        ('{"samples": [1, "x"]}', "field 'samples' must be a list, not"),
        ('{"samples": [], "note": 5}', "field 'note' must be a string or null, not 5"),
        ('{"samples": [], "settings": []}', "field 'settings' must be an object"),
        ('{"samples": [], "other": 1}', "unknown field 'other'; known are settings, environment"),
    ],
)
def test_damage_is_named_with_file_and_field(tmp_path, content, reason):
    file = tmp_path / "count.json"
    file.write_text(content)
    with pytest.raises(ResultsError, match=reason) as raised:
        Count.load(tmp_path)
    assert str(file) in str(raised.value)


def test_a_missing_record_says_how_to_make_it(tmp_path):
    with pytest.raises(ResultsError, match=r"count\.json: no such file: measure with `labkit count` first"):
        Count.load(tmp_path)
