"""YAML as plans and configurations hold it: slips are refused in one line, and merge keys and dates are read."""

import pytest

from labkit.common.errors import LabError
from labkit.common.yaml_text import parse_yaml, read_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("name: 2026-13-45", {"name": "2026-13-45"}),
        ("name: 2026-01-02", {"name": "2026-01-02"}),
        ("- &a {role: decoder, scheme: int4}\n- {<<: *a, role: vision}",
         [{"role": "decoder", "scheme": "int4"}, {"role": "vision", "scheme": "int4"}]),
        ("x: [[[&b {<<: {role: q}, role: v}]]]\ny: {<<: *b, z: 1}",
         {"x": [[[{"role": "v"}]]], "y": {"role": "v", "z": 1}}),
        ("", None),
    ],
)  # fmt: skip
def test_what_is_read(text, value):
    assert parse_yaml(text) == value


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("name: {{ name }}", "unfilled {{ template }}"),
        ("[a, b]: 3", "a key must be text"),
        ("rules: " + "[" * 3000 + "]" * 3000, "nested too deeply"),
        ("a: 1\na: 2", "'a' is given twice at line 2"),
        ("a: &x [*x]", "an alias stands inside its own anchor"),
        ("a: !!timestamp 2026-13-45", "not readable"),
        ("a: !!int x", "not readable"),
        ("a: !!bool maybe", "not readable"),
        ("a: !!set {x}", "constructor"),
        ("a: !!python/object:os.system x", "constructor"),
        ("a: " + "9" * 5000, "4300 digits"),
        ("<<: 3", "not readable"),
        ("a: *b", "undefined alias"),
        ("\0", "not readable"),
    ],
)
def test_what_is_refused(text, reason):
    with pytest.raises(LabError) as caught:
        parse_yaml(text)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_text_is_named(tmp_path):
    (tmp_path / "mine.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(LabError, match=r"mine\.yaml cannot be read: it is not UTF-8 text"):
        read_yaml(tmp_path / "mine.yaml")
