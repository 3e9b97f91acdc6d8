"""The plan editor: rules, YAML and predicted bytes always say the same, and what is wrong is said."""

import pytest
import yaml

from labkit.common.formats import format_bytes
from labkit.interactive.widgets import plan_editor
from labkit.interactive.widgets.editor import DEFAULT
from labkit.measure import anatomy
from labkit.models import get_spec
from labkit.plans.plan import QuantizationPlan

pytestmark = pytest.mark.skipif(
    get_spec("pocket").availability() != "here", reason="the pocket model is not in assets"
)


def predicted(plan):
    return format_bytes(anatomy.dissect("pocket").under(plan).bytes)


def test_a_cell_with_a_widget_can_be_run_again():
    from labkit.interactive import widgets

    for make in ("plan_editor", "compare"):
        for _ in range(2):
            assert getattr(widgets, make)("pocket").children


def test_it_begins_with_the_plan_that_is_given():
    editor = plan_editor("pocket", "int8")
    assert editor.plan == QuantizationPlan.preset("int8")
    assert {rule.scheme.value for rule in editor.rules.values()} == {"int8"}
    assert f"<b>{predicted('int8')}</b>" in editor.bytes.value


def test_a_rule_changes_yaml_and_bytes():
    editor = plan_editor()
    editor.rules["decoder"].options.controls["num_bits"].value = 2
    written = yaml.safe_load(editor.yaml.value)
    [decoder] = [rule for rule in written["rules"] if rule["role"] == "decoder"]
    assert (decoder["scheme"], decoder["num_bits"]) == ("int4", 2)
    assert QuantizationPlan.from_dict(written) == editor.plan
    assert f"<b>{predicted(editor.plan)}</b>" in editor.bytes.value
    assert predicted(editor.plan) != predicted("int4")
    bars = {trace.name: list(trace.x) for trace in editor.chart.figure.data}
    assert bars["decoder"][1] < bars["decoder"][0] / 4


def test_a_changed_preset_gets_a_name_of_its_own():
    editor = plan_editor()
    editor.rules["vision"].scheme.value = DEFAULT
    assert editor.plan.name == editor.name.value == "int4-mine"
    assert "vision" not in {role for rule in editor.plan.rules for role in rule.roles}


def test_yaml_changes_the_rules():
    editor = plan_editor()
    editor.yaml.value = (
        "name: mixed\nrules:\n- {role: decoder, scheme: nf4, group_size: 128}\ndefault: fp16\n"
    )
    assert editor.rules["decoder"].scheme.value == "nf4"
    assert editor.rules["decoder"].options.controls["group_size"].value == 128
    assert editor.rules["vision"].scheme.value == DEFAULT
    assert (editor.name.value, editor.default.value) == ("mixed", "fp16")
    assert editor.plan.name == "mixed"


def test_rules_by_name_stay_when_a_part_is_changed():
    editor = plan_editor()
    first = "{match: '*.layers.0.mlp.down_proj', scheme: int8}"
    editor.yaml.value = f"name: mixed\nrules: [{first}, {{role: decoder, scheme: int4}}]"
    assert "several schemes in this part" in editor.rules["decoder"].mixed.value
    editor.rules["vision"].scheme.value = "int8"
    assert [rule.match for rule in editor.plan.rules] == ["*.layers.0.mlp.down_proj", None, None]


def test_embedding_and_convolutions_are_kept_dropped_and_added():
    editor = plan_editor("pocket", "article")
    assert editor.stored.value
    stored = [rule for rule in editor.plan.rules if "linear" not in rule.modules]
    editor.rules["decoder"].scheme.value = "int8"
    assert [rule for rule in editor.plan.rules if "linear" not in rule.modules] == stored
    with_them = anatomy.dissect("pocket").under(editor.plan).bytes
    editor.stored.value = False
    assert not any("linear" not in rule.modules for rule in editor.plan.rules)
    assert anatomy.dissect("pocket").under(editor.plan).bytes > with_them
    other = plan_editor("pocket", "int4")
    other.stored.value = True
    assert "Not possible" not in other.status.value, other.status.value
    assert anatomy.dissect("pocket").under(other.plan).bytes < anatomy.dissect("pocket").under("int4").bytes


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("name: [", "not readable as YAML"),
        ("name: x\nrules: [{role: eye, scheme: int4}]", "unknown role"),
        ("name: x\nrules: [{role: decoder, scheme: int5}]", "unknown scheme"),
        ("name: x\nrules: [{role: decoder, scheme: int4, group_size: 100}]", "does not divide"),
    ],
)
def test_what_is_no_plan_is_said_and_gives_none(text, told):
    editor = plan_editor()
    editor.yaml.value = text
    assert "Not possible" in editor.status.value
    assert told in editor.status.value
    assert editor.plan is None
    editor.save_button.click()
    assert "this is no plan yet" in editor.status.value


def test_what_is_saved_is_the_plan(tmp_path):
    editor = plan_editor()
    editor.rules["lm_head"].scheme.value = "int8"
    editor.path.value = str(tmp_path / "mine.yaml")
    editor.save_button.click()
    assert QuantizationPlan.from_yaml(tmp_path / "mine.yaml") == editor.plan


def test_the_big_model_needs_no_download():
    editor = plan_editor("autoglm-phone-9b", "int4")
    assert "speech" not in editor.rules
    assert "GB</b> of weights are predicted" in editor.bytes.value
