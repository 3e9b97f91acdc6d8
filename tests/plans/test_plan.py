"""Plans: what they say, what they refuse, and what they predict before anything is loaded."""

import textwrap
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from labkit.plans.plan import PlanError, QuantizationPlan, presets
from labkit.plans.resolved import grouped
from labkit.plans.rule import relative_depths
from labkit.quantization import known_schemes

PRESETS = ["fp32", "fp16", "bf16", "int8", "int8-dynamic", "int4", "nf4", "llm-int8"]
ROLES = {"eye.0": "vision", "eye.1": "vision", "body.0": "decoder", "body.1": "decoder", "head": "lm_head"}


class Small(nn.Module):
    """A model with parts, a norm, an embedding and a computed table."""

    def __init__(self, tied=False):
        super().__init__()
        self.embed = nn.Embedding(50, 64)
        self.eye = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64, bias=False))
        self.body = nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 64))
        self.norm = nn.LayerNorm(64)
        self.head = nn.Linear(64, 50, bias=False)
        self.register_buffer("inv_freq", torch.rand(8), persistent=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.norm(self.body(self.eye(self.embed(ids)))))


def plan(text):
    return QuantizationPlan.from_dict(yaml.safe_load(textwrap.dedent(text)))


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_there_valid_and_round_trip(name, tmp_path):
    preset = QuantizationPlan.preset(name)
    assert preset.name == name
    assert len(preset.description) > 20
    assert preset.rules[0].scheme.name == name
    assert preset.default == (name if name in ("fp32", "fp16") else "bf16")
    preset.to_yaml(tmp_path / "copy.yaml")
    assert QuantizationPlan.from_yaml(tmp_path / "copy.yaml") == preset
    assert QuantizationPlan.from_yaml(name) == preset


def skeleton(model):
    from labkit.models import get_spec
    from labkit.models.checkpoint import Checkpoint

    return Checkpoint(get_spec(model)).skeleton()


@pytest.fixture(scope="module")
def nine_billion():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        return skeleton("autoglm-phone-9b")


def schemes_by_role(resolved):
    found = {}
    for part in resolved.parts:
        if part.module in resolved.schemes and (part.is_linear or part.role == "embedding"):
            found.setdefault(part.role, set()).add(part.scheme)
    assert all(len(names) == 1 for names in found.values())
    return {role: names.pop() for role, names in found.items()}


ARTICLE = {"decoder": "gptq", "lm_head": "int8", "embedding": "int8"}
RECIPES = {
    "article": {**ARTICLE, "vision": "int8-dynamic", "projector": "int8-dynamic"},
    "article-hybrid": {**ARTICLE, "vision": "llm-int8", "projector": "llm-int8"},
    "article-code": {"decoder": "nf4", "vision": "nf4", "projector": "nf4", "lm_head": "bf16"},
}


@pytest.mark.parametrize("name", RECIPES)
def test_the_articles_recipes_fit_the_9b_model(nine_billion, name):
    resolved = QuantizationPlan.preset(name).resolve(nine_billion)
    assert schemes_by_role(resolved) == RECIPES[name]
    assert 6.5e9 < resolved.predicted_bytes < 7.5e9


@pytest.mark.parametrize("name", RECIPES)
def test_the_articles_recipes_fit_the_pocket_model(name):
    import tiny_models

    resolved = QuantizationPlan.preset(name).resolve(tiny_models.pocket()[0])
    more = {
        "article": {"speech": "int8-dynamic", "cross_modal": "fp16"},
        "article-hybrid": {"speech": "llm-int8", "cross_modal": "fp16"},
        "article-code": {"speech": "nf4", "cross_modal": "nf4"},
    }
    assert schemes_by_role(resolved) == RECIPES[name] | more[name]
    smoothed = [
        scheme for scheme in resolved.schemes.values() if getattr(scheme, "smoothing", "none") == "rms"
    ]
    assert bool(smoothed) == (name == "article")


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.filterwarnings("ignore:plan ")
def test_the_articles_recipes_degrade_what_int4_cannot_take_to_int8(name):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=48, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    resolved = QuantizationPlan.preset(name).resolve(model)
    assert resolved.schemes["model.layers.0.self_attn.q_proj"].name == "int8"
    assert resolved.schemes["model.layers.0.mlp.down_proj"].name == RECIPES[name]["decoder"]
    assert any("q_proj gets int8 instead of" in note for note in resolved.notes)


def test_presets_are_listed_usual_ones_first():
    assert presets()[:8] == PRESETS
    assert set(PRESETS) <= set(known_schemes())


def test_first_rule_that_matches_wins():
    resolved = plan("""
        name: p
        rules:
          - {match: body.1, scheme: bf16}
          - {role: [decoder, lm_head], scheme: int4, group_size: 32}
          - {match: "re:eye\\\\.\\\\d", scheme: int8-dynamic}
    """).resolve(Small(), ROLES)
    assert {name: scheme.name for name, scheme in resolved.schemes.items()} == {
        "eye.0": "int8-dynamic",
        "eye.1": "int8-dynamic",
        "body.0": "int4",
        "body.1": "bf16",
        "head": "int4",
    }
    assert resolved.rules == {"eye.0": 3, "eye.1": 3, "body.0": 2, "body.1": 1, "head": 2}
    assert resolved.schemes["head"].group_size == 32


def test_glob_and_exact_names_match():
    resolved = plan("""
        name: p
        rules: [{match: "*.0", scheme: int8}, {match: head, scheme: fp32}]
    """).resolve(Small(), {})
    assert list(resolved.schemes) == ["eye.0", "body.0", "head"]


class Stack(nn.Module):
    """A stack of layers, each with two Linears, and one Linear in no stack."""

    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(64, 64), "down": nn.Linear(64, 64)}) for _ in range(layers)
        )
        self.head = nn.Linear(64, 64)


DEPTHS = """
    name: p
    rules:
      - {match: "*", linear: up, depth: [0, 0.5], scheme: int4}
      - {match: "re:layers.*", depth: [0.5, 1], scheme: int8}
      - {match: "*", linear: [down, head], scheme: bf16}
"""


@pytest.mark.parametrize("layers", [2, 4, 10])
def test_depth_means_the_same_part_of_a_stack_of_any_height(layers):
    schemes = {name: scheme.name for name, scheme in plan(DEPTHS).resolve(Stack(layers), {}).schemes.items()}
    half = layers // 2
    assert {name for name, scheme in schemes.items() if scheme == "int4"} == {
        f"layers.{i}.up" for i in range(half)
    }
    assert {name for name, scheme in schemes.items() if scheme == "int8"} == {
        f"layers.{i}.{kind}" for i in range(half, layers) for kind in ("up", "down")
    }
    assert schemes["head"] == schemes["layers.0.down"] == "bf16"


def test_depths_of_an_odd_stack_leave_no_layer_out():
    assert relative_depths([f"a.layers.{i}.fc" for i in range(3)] + ["head"]) == {
        "a.layers.0.fc": 1 / 6,
        "a.layers.1.fc": 0.5,
        "a.layers.2.fc": 5 / 6,
    }
    assert len(plan(DEPTHS).resolve(Stack(3), {}).schemes) == 7


def test_depth_and_linear_round_trip_and_are_told_in_errors(tmp_path):
    made = plan(DEPTHS)
    made.to_yaml(tmp_path / "p.yaml")
    assert QuantizationPlan.from_yaml(tmp_path / "p.yaml") == made
    wrong = plan("{name: p, rules: [{match: '*', linear: gate, depth: [0, 0.5], scheme: int4}]}")
    with pytest.raises(
        PlanError,
        match=r"\(match \*, linear gate, depth 0 to 0\.5 -> int4\) matches no Linear; 5 Linears .* are up, down, head",
    ):
        wrong.resolve(Stack(2), {})


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("depth: [0.5, 0.5]", "0 <= from < to <= 1"),
        ("depth: [0, 1.5]", "0 <= from < to <= 1"),
        ("depth: 0.5", "depth is"),
        ("depth: [no, 1]", "depth is"),
        ("linear: []", "a Linear's own name"),
        ("linear: mlp.up", "a Linear's own name"),
        ("linear: 3", "a Linear's own name"),
    ],
)
def test_wrong_depths_and_names_are_refused(rule, message):
    with pytest.raises(PlanError, match=message):
        plan(f"{{name: p, rules: [{{match: '*', {rule}, scheme: int4}}]}}")


def test_predicted_bytes_on_the_meta_device_are_those_of_the_arithmetic():
    with torch.device("meta"):
        model = Small()
    resolved = plan("""
        name: p
        rules: [{role: decoder, scheme: int4}, {role: vision, scheme: int8}]
    """).resolve(model, ROLES)
    body = 128 * 32 + 4 * 128 + 2 * 128 + 64 * 64 + 4 * 64 * 2 + 2 * 64
    eye = 2 * 64 * (64 + 2) + 2 * 64
    head, embed, norm, table = 2 * 64 * 50, 2 * 64 * 50, 2 * 2 * 64, 4 * 8
    assert resolved.predicted_bytes == body + eye + head + embed + norm + table
    assert resolved.bytes_by_role == {
        "decoder": body,
        "vision": eye,
        "lm_head": head,
        "other": embed + norm + table,
    }
    assert sum(row["bytes"] for row in resolved.rows()) == resolved.predicted_bytes
    assert resolved.table().set_index("role").loc["decoder", "linears"] == 2


def test_a_tied_head_is_counted_once_and_left_alone_unless_named():
    model = Small(tied=True)
    everywhere = QuantizationPlan.uniform("int8").resolve(model, {})
    assert "head" not in everywhere.schemes
    assert any(
        note.startswith("head is left alone: its weight is tied to embed") for note in everywhere.notes
    )
    untied = QuantizationPlan.uniform("int8").resolve(Small(), {})
    assert untied.predicted_bytes - everywhere.predicted_bytes == 50 * (64 + 2)
    named = plan("""
        name: p
        rules: [{match: head, scheme: int8}, {match: "re:.*", scheme: int8}]
    """).resolve(model, {})
    assert named.predicted_bytes == untied.predicted_bytes


def test_on_unsupported_degrades_with_a_warning_and_a_note():
    text = "{name: p, rules: [{match: 're:.*', scheme: int4, group_size: 128, on_unsupported: int8}]}"
    with pytest.warns(
        UserWarning, match=r"rule 1: eye.0 gets int8 instead of int4: group_size 128 .* and 3 more"
    ):
        resolved = plan(text).resolve(Small(), {})
    assert {name: s.name for name, s in resolved.schemes.items()} == {
        **dict.fromkeys(["eye.0", "eye.1", "body.0", "head"], "int8"),
        "body.1": "int4",
    }
    assert len(resolved.notes) == 4


REFUSED_FILES = [
    ("[]", "a plan is a mapping"),
    ("{rules: []}", "the key name is missing"),
    ("{name: p}", "the key rules is missing"),
    ("{name: p, rules: [], defualt: bf16}", "unknown key 'defualt'; known are name, rules"),
    ("{name: p, rules: [], default: int8}", "default must be one of fp32, fp16, bf16, not 'int8'"),
    ("{name: p, rules: {role: decoder}}", "rules must be a list"),
    ("{name: p, rules: [int8]}", "rule 1: a rule is a mapping"),
    ("{name: p, rules: [{scheme: int8}]}", "rule 1: give either role or match"),
    ("{name: p, rules: [{match: a, role: vision, scheme: int8}]}", "rule 1: give either role or match"),
    ("{name: p, rules: [{match: a}]}", "rule 1: the key scheme is missing"),
    (
        "{name: p, rules: [{match: a, scheme: int8}, {match: a, scheme: int7}]}",
        "rule 2: unknown scheme 'int7'; known",
    ),
    (
        "{name: p, rules: [{match: a, scheme: int4, groupsize: 64}]}",
        "rule 1: unknown option 'groupsize'.*group_size",
    ),
    (
        "{name: p, rules: [{role: ears, scheme: int8}]}",
        "rule 1: unknown role 'ears'; known are vision, speech",
    ),
    ("{name: p, rules: [{role: [], scheme: int8}]}", "rule 1: role is an empty list; known are vision"),
    ("{name: p, rules: [{match: 're:(', scheme: int8}]}", "rule 1: .* no regular expression"),
    ("{name: p, rules: [{match: a, scheme: int4, on_unsupported: int9}]}", "rule 1: unknown scheme 'int9'"),
    ("{name: p, rules: [{match: a, scheme: int4, optional: 1}]}", "optional must be true or false"),
    ("{name: p, rules: [], runtime: {kv_cash: int8}}", "runtime takes kv_cache and sliding_window"),
    ("{name: p, rules: [], runtime: {kv_cache: int3}}", "kv_cache must be one of fp32, fp16, bf16, int8"),
    ("{name: p, rules: [], runtime: {sliding_window: -1}}", "sliding_window must be a number of tokens"),
]


@pytest.mark.parametrize(
    ("text", "message"), REFUSED_FILES, ids=[message[:30] for _, message in REFUSED_FILES]
)
def test_a_wrong_file_is_refused_with_its_name(text, message, tmp_path):
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(PlanError, match=rf"wrong\.yaml: .*{message}"):
        QuantizationPlan.from_yaml(path)


def test_unreadable_files_and_unknown_names_are_refused(tmp_path):
    with pytest.raises(PlanError, match=r"no plan file or preset 'int5'; presets are fp32, fp16, bf16"):
        QuantizationPlan.from_yaml("int5")
    path = tmp_path / "broken.yaml"
    path.write_text("name: [")
    with pytest.raises(PlanError, match=r"broken.yaml: not readable as YAML"):
        QuantizationPlan.from_yaml(path)
    path.write_text("{name: p, rules: [{match: a, scheme: int4, scheme: int8}]}")
    with pytest.raises(PlanError, match="the key 'scheme' is given twice"):
        QuantizationPlan.from_yaml(path)


REFUSED_ON_MODEL = [
    (
        "{match: tail, scheme: int8}",
        r"rule 1 \(match tail -> int8\) matches no Linear; Linears are eye.0, eye.1",
    ),
    (
        "{role: speech, scheme: int8}",
        r"rule 1 \(role speech -> int8\) .* by role: vision 2, decoder 2, lm_head 1",
    ),
    (
        "{match: body.0, scheme: int4, group_size: 48}",
        r"rule 1 .*: body.0: group_size 48 does not divide 64 .*32 or 64",
    ),
    (
        "{match: 're:.*', scheme: int4, group_size: 7, on_unsupported: nf4, }, {match: a, scheme: int8}",
        "rule 2",
    ),
]


@pytest.mark.filterwarnings("ignore:plan p")
@pytest.mark.parametrize(("rule", "message"), REFUSED_ON_MODEL)
def test_a_plan_that_does_not_fit_the_model_names_the_rule(rule, message):
    with pytest.raises(PlanError, match=message):
        plan(f"{{name: p, rules: [{rule}]}}").resolve(Small(), ROLES)


def test_rules_without_effect_are_errors_unless_optional():
    text = "{name: p, rules: [{match: 're:.*', scheme: int8}, {match: head, scheme: fp16%s}]}"
    with pytest.raises(PlanError, match=r"rule 2 .* has no effect: earlier rules match all its Linears"):
        plan(text % "").resolve(Small(), {})
    assert plan(text % ", optional: true").resolve(Small(), {}).schemes["head"].name == "int8"
    with pytest.raises(PlanError, match=r"matches only tied Linears \(head\): name it exactly"):
        plan("{name: p, rules: [{match: 're:head', scheme: int8}]}").resolve(Small(tied=True), {})


def test_role_rules_on_a_model_without_roles_say_so():
    with pytest.raises(PlanError, match="no roles are known for this model"):
        plan("{name: p, rules: [{role: decoder, scheme: int8}]}").resolve(Small())


def test_a_device_the_scheme_cannot_run_on_is_named():
    with pytest.raises(PlanError, match=r"rule 1 .*: eye.0: scheme int8 runs on cpu and cuda, not on mps"):
        QuantizationPlan.uniform("int8").resolve(Small(), {}, device="mps")


def test_attention_that_reads_its_weight_directly_is_left_alone():
    resolved = QuantizationPlan.uniform("int8").resolve(nn.TransformerEncoderLayer(64, 2, 128), {})
    assert list(resolved.schemes) == ["linear1", "linear2"]
    left_alone, share = resolved.notes
    assert left_alone == "self_attn.out_proj is left alone: nn.MultiheadAttention reads its weight directly"
    assert share.startswith("other: the rules reach 50% of its 33,472 values")


def test_uniform_plans_take_options():
    three = QuantizationPlan.uniform("int4", num_bits=3)
    assert three.name == "int4-num-bits-3"
    bits = [
        row["bits_per_parameter"] for row in three.resolve(nn.Sequential(nn.Linear(64, 64, False)), {}).rows()
    ]
    assert bits == [3.5]


def test_the_plans_folder_holds_what_is_listed():
    folder = Path(__file__).parents[2] / "assets" / "plans"
    assert sorted(presets()) == sorted(path.stem for path in folder.glob("*.yaml"))


def test_a_plans_map_shows_the_scheme_and_bits_of_every_linear():
    import tiny_models

    from labkit.results.charts.methods import plan_map

    plan = QuantizationPlan.from_dict(
        {"name": "p", "rules": [{"match": "*", "linear": "down_proj", "scheme": "int8"}]}
    )
    resolved = plan.resolve(tiny_models.llama())
    found = resolved.linears()
    assert len(found) == sum(part.is_linear for part in resolved.parts)
    assert {one["scheme"] for one in found if one["kind"] == "down_proj"} == {"int8"}
    [drawn] = plan_map(found).data
    row = drawn.y.index("decoder · down_proj")
    assert len(drawn.z[row]) == 2
    assert all(8 <= bits < 8.5 for bits in drawn.z[row])
    assert drawn.z[drawn.y.index("lm_head · lm_head")] == [16.0, None]
    assert "int8" in drawn.text[row][1]


def test_notes_that_are_alike_share_a_line_with_their_number():
    notes = [f"layers.{number}.q gets int8 instead of int4: too narrow" for number in range(180)]
    assert grouped([*notes, "head is left alone: tied"]) == [
        "layers.0.q gets int8 instead of int4: too narrow (179 more like it)",
        "head is left alone: tied",
    ]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("name: [m]\nrules: []\n", "a plan's name is text"),
        ("name: m\nrules: []\ndefault: [bf16]\n", "default must be one of"),
        ("name: m\nrules:\n  - role: decoder\n    scheme: [int4]\n", r"unknown scheme \['int4'\]"),
        ("name: m\nrules:\n  - {role: decoder, scheme: int4, on_unsupported: [int8]}\n", "unknown scheme"),
        ("name: {{ name }}\nrules: []\n", "unfilled"),
    ],
)
def test_a_list_or_a_template_for_a_name_is_refused(tmp_path, text, reason):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(PlanError, match=reason):
        QuantizationPlan.from_yaml(tmp_path / "mine.yaml")


def test_a_date_for_a_name_is_text(tmp_path):
    (tmp_path / "mine.yaml").write_text("name: 2026-12-01\nrules: []\n")
    assert QuantizationPlan.from_yaml(tmp_path / "mine.yaml").name == "2026-12-01"
