"""The anatomy of a model: every parameter counted once, in the right part; charts draw those counts."""

import subprocess
import sys

import pytest
import tiny_models

import labkit
from labkit.common.errors import LabError
from labkit.measure import anatomy
from labkit.models.pocket import PocketConfig
from labkit.models.spec import GLM_4_1V_9B, ModelSpec
from labkit.phonetap import draw_screen

PUBLISHED = ModelSpec("big", "nobody/offline", published=GLM_4_1V_9B)


@pytest.fixture(scope="module")
def pocket(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    PocketConfig.tiny().save_pretrained(folder)
    return anatomy.dissect(folder)


@pytest.fixture(scope="module")
def big():
    return anatomy.dissect(PUBLISHED)


def test_parts_add_up_to_the_model(pocket):
    counted = sum(parameter.numel() for parameter in pocket.skeleton.parameters())
    assert pocket.parameters == counted == sum(pocket.parameters_by_role.values())
    assert pocket.table()["share"].sum() == pytest.approx(1)
    assert pocket.table()["bytes"].sum() == pocket.bytes


def test_the_pocket_model_has_the_articles_four_parts(pocket):
    assert {"vision", "speech", "cross_modal", "decoder"} <= set(pocket.parameters_by_role)


def test_the_9b_has_its_published_sizes_without_a_network(big, monkeypatch):
    monkeypatch.setattr("labkit.models.hub._from_hub", lambda *_: pytest.fail("the hub was asked"))
    again = anatomy.dissect("autoglm-phone-9b")
    assert again.parameters == big.parameters == pytest.approx(10.293e9, rel=1e-4)
    assert big.under("fp32").bytes == pytest.approx(41.2e9, rel=2e-3)
    assert "speech" not in big.parameters_by_role
    assert "cross_modal" not in big.parameters_by_role
    assert all(parameter.is_meta for parameter in big.skeleton.parameters())


def test_the_9bs_kv_cache_and_image_tokens_are_the_known_ones(big):
    assert big.kv_cache_bytes_per_token() == 40_960
    assert big.under("fp32").kv_cache_bytes_per_token() == 81_920
    assert big.image_tokens(1080, 2400) == 3354
    assert big.image_tokens(1080, 2400, max_pixels=5_000_000) == 3108
    assert big.image_tokens(1080, 2400, max_pixels=500_000) == 286


def test_image_tokens_are_those_the_processor_makes(pocket):
    _, processor = tiny_models.pocket()
    message = [
        {"role": "user", "content": [{"type": "image", "image": draw_screen(1, size=(224, 476)).image}]}
    ]
    made = processor(message)["mm_token_type_ids"].sum().item()
    assert pocket.image_tokens(224, 476) == made
    assert pocket.image_grid(224, 476) == (17, 8)


def test_fewer_bits_make_fewer_bytes_in_every_part_with_linears(pocket):
    sizes = pocket.bytes_under(["fp32", "bf16", "int8", "int4"])
    for part in ("vision", "speech", "cross_modal", "decoder"):
        assert list(sizes.loc[part]) == sorted(sizes.loc[part], reverse=True)
    assert sizes.loc["cross_modal", "int4"] < sizes.loc["cross_modal", "fp32"] / 4
    assert sizes.loc["embedding", "int4"] == sizes.loc["embedding", "bf16"]


def test_kinds_of_linears_cover_all_of_them(pocket, big):
    for one in (pocket, big):
        linears = one.linears()
        assert linears["count"].sum() == sum(part.is_linear for part in one.parts)
        weights = linears["count"] * linears["out_features"] * linears["in_features"]
        assert (linears["parameters"] >= weights).all()
    assert big.linears().loc["model.language_model.layers.N.mlp.down_proj", "count"] == 40


def test_the_treemap_adds_up_on_every_level(pocket):
    trace = pocket.treemap("bytes").data[0]
    inside = dict.fromkeys(trace.ids, 0)
    for parent, value in zip(trace.parents, trace.values):
        if parent:
            inside[parent] += value
    for key, value in zip(trace.ids, trace.values):
        assert inside[key] in (0, value)
    assert trace.values[0] == pocket.bytes


def test_the_skyline_has_one_bar_a_linear(big):
    bars = [count for trace in big.skyline().data for count in trace.y]
    assert len(bars) == 365
    assert sum(trace.name == "decoder (240)" for trace in big.skyline().data) == 1


def test_bars_of_a_plan_add_up_to_its_bytes(big):
    chart = big.plan_chart(["bf16", *anatomy.article_steps()], anatomy.ARTICLE_BYTES)
    at = chart.data[0].y.index("int4 decoder")
    total = sum(trace.x[at] for trace in chart.data) * 1e9
    assert total == pytest.approx(big.under(anatomy.article_steps()[0]).bytes, rel=1e-3)
    words = [annotation.text for annotation in chart.layout.annotations]
    assert "article: before, 18.3 GB" in words
    assert "20.6 GB" in words


def test_shares_of_every_model_reach_the_whole(pocket, big):
    chart = anatomy.shares_chart([pocket, big])
    for at in range(2):
        assert sum(trace.x[at] for trace in chart.data) == pytest.approx(100, abs=0.5)


def test_the_memory_chart_adds_the_kv_cache_to_the_weights(big):
    line = big.memory_chart(["bf16"], tokens=1000).data[0]
    assert (line.y[1] - line.y[0]) * 1e9 == pytest.approx(40_960_000)


def test_the_articles_claims_stand_beside_computed_figures(big):
    claims = anatomy.article_claims(big)
    computed = claims.iloc[:, 1]
    assert "41.2 GB" in computed["weights in FP32"]
    assert "there is none" in computed["speech encoder"]
    assert "210 M" in computed["cross-modal attention"]


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda one: one.treemap("colour"), "parameters or bytes"),
        (lambda one: one.memory_chart(["bf16"], tokens=0), "1 or more"),
        (lambda one: one.under("int5"), "presets are"),
        (lambda one: anatomy.shares_chart([]), "nothing to draw"),
    ],
)
def test_wrong_questions_are_answered_clearly(pocket, ask, words):
    with pytest.raises(LabError, match=words):
        ask(pocket)


def test_a_text_model_has_no_image_tokens(tmp_path):
    config = tiny_models.llama_config()
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    text = anatomy.dissect(tmp_path)
    with pytest.raises(labkit.LabError, match="no Glm4v vision encoder"):
        text.image_tokens(224, 476)


def test_drawing_an_anatomy_needs_no_torch():
    code = "import sys, labkit.results.charts.anatomy; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
