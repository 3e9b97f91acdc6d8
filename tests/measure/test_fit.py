"""`labkit fit`: what a plan needs is said before anything is loaded, and is what is then needed."""

import json

import pytest
import tiny_models
import torch
from transformers.models.glm4v.configuration_glm4v import Glm4vConfig
from transformers.models.glm4v.modeling_glm4v import Glm4vTextModel, Glm4vVisionModel

import labkit
from labkit.cli.main import main
from labkit.common.errors import LabError
from labkit.measure.anatomy import Anatomy, dissect
from labkit.measure.fit import LIBRARY_BYTES, activation_bytes, find_card, needs, unpacked_cache_bytes
from labkit.measure.fit_check import LiveBytes, check_plan
from labkit.quantization.kernels import upcast


@pytest.fixture(scope="module")
def glm4v():
    """An anatomy with the proportions of Glm4v: only its configuration is looked at."""
    config = Glm4vConfig()
    config.vision_config.update(
        {"depth": 2, "hidden_size": 384, "num_heads": 3, "out_hidden_size": 1024, "intermediate_size": 3424}
    )
    config.text_config.update(
        {"num_hidden_layers": 2, "hidden_size": 1024, "num_attention_heads": 8, "intermediate_size": 3424}
    )
    config.text_config.rope_parameters = {
        "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 12, 12],
        "partial_rotary_factor": 0.5,
    }  # fmt: skip
    config.text_config.vocab_size = 256
    skeleton = type("Skeleton", (), {"config": config})()
    return Anatomy(
        None, skeleton, {}, type("Resolved", (), {"plan": labkit.QuantizationPlan.preset("bf16")})()
    )


def test_activations_of_the_eye_are_those_that_live_when_it_looks(glm4v):
    vision = Glm4vVisionModel._from_config(glm4v.skeleton.config.vision_config, dtype=torch.bfloat16).eval()
    rows, columns = 28, 40
    with torch.inference_mode(), LiveBytes() as live:
        vision(torch.randn(rows * columns, 1176), torch.tensor([(1, rows, columns)]))
    predicted = activation_bytes(glm4v, 1, rows * columns // 4)
    assert predicted == pytest.approx(live.peak_bytes, rel=0.1)


def test_activations_of_the_decoder_are_those_that_live_in_its_prefill(glm4v):
    text = Glm4vTextModel._from_config(glm4v.skeleton.config.text_config, dtype=torch.bfloat16).eval()
    tokens = 256
    with torch.inference_mode(), LiveBytes() as live:
        embeddings = torch.zeros(1, tokens, 1024, dtype=torch.bfloat16)
        text(
            inputs_embeds=embeddings, position_ids=torch.arange(tokens).expand(4, 1, tokens), use_cache=False
        )
    assert activation_bytes(glm4v, tokens, 0) == pytest.approx(live.peak_bytes, rel=0.1)


def test_weights_and_cache_are_those_that_are_counted():
    folder = "pocket"
    [need] = needs(folder, ["int4"], context=300, screen=(224, 476))
    engine = labkit.load(folder, "int4", progress=False)
    assert need.weights_bytes == engine.resolved.predicted_bytes
    anatomy = dissect(folder, "int4")
    assert need.cache_bytes == 300 * anatomy.kv_cache_bytes_per_token()
    assert need.total_bytes == (
        need.weights_bytes + need.cache_bytes + need.activation_bytes + need.workspace_bytes
    )


def test_fewer_bits_need_less_and_may_decode_faster():
    plans = ["fp32", "bf16", "int8-dynamic"]
    found = needs("autoglm-phone-9b", plans, context=4096)
    sizes = [need.total_bytes for need in found]
    assert sizes == sorted(sizes, reverse=True)
    speeds = [need.most_tokens_per_s(4.8e12) for need in found]
    assert speeds == sorted(speeds)
    assert 100 < speeds[0] < 140  # 41 GB less the eye and the embeddings at 4.8 TB/s
    assert all(need.workspace_bytes == LIBRARY_BYTES for need in found)  # nothing is unpacked


def test_a_longer_context_needs_more_cache_and_text_alone_no_eye():
    short, long = (needs("autoglm-phone-9b", ["bf16"], context=c)[0] for c in (4096, 25480))
    assert long.cache_bytes == 25480 * 40960  # bytes a token, as the model's configuration has it
    assert long.activation_bytes > short.activation_bytes
    text = needs("autoglm-phone-9b", ["bf16"], context=1000, screen=None)[0]
    assert text.activation_bytes < short.activation_bytes


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--memory", "lots"], "written 60MB or 5.5GB"),
        (["--card", "rtx4090"], "did you mean rtx-4090"),
        (["--memory", "8GB", "--screen", "big"], "write 1080x2400, or none"),
        (["--memory", "8GB", "--context", "1000"], "takes 3354 tokens, and the context has 1000"),
        (["--memory", "8GB", "--bandwidth", "0"], "above 0"),
        (["--memory", "8GB", "--plans", "int5"], "int5"),
    ],
)
def test_a_wrong_question_is_answered_with_what_is_wrong(given, said, capsys):
    assert main(["fit", "autoglm-phone-9b", *given]) == 2
    assert said in capsys.readouterr().err


def test_the_command_says_what_fits(capsys):
    assert (
        main(["fit", "autoglm-phone-9b", "--memory", "12GB", "--plans", "bf16,int4", "--bandwidth", "900"])
        == 0
    )
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.split()}
    assert "too much" in lines["bf16"]
    assert " yes " in lines["int4"]


def test_an_int8_cache_counts_its_scales_and_a_window_ends_it():
    whole, int8, window = needs("autoglm-phone-9b", ["bf16", "int8-kv", "window"], context=25480)
    assert int8.cache_bytes == 25480 * 2 * 40 * 2 * (128 + 2)
    assert window.cache_bytes == (4096 + 4) * 40960
    assert whole.cache_bytes == 25480 * 40960
    assert whole.weights_bytes == int8.weights_bytes == window.weights_bytes
    assert int8.read_bytes < whole.read_bytes
    few = needs("autoglm-phone-9b", ["int8-kv"], context=1000, screen=None)[0]
    anatomy = dissect("autoglm-phone-9b", "int8-kv")
    assert (
        unpacked_cache_bytes(anatomy, 1000) == 1000 * 2 * 2 * 128 * 2
    )  # one layer's keys and values in bf16
    assert unpacked_cache_bytes(anatomy.under("bf16"), 1000) == 0
    assert few.activation_bytes >= unpacked_cache_bytes(anatomy, 1000)


@pytest.fixture(scope="module")
def random_glm4v(tmp_path_factory):
    """A folder with a configuration and nothing else; wide enough that tensors outweigh odds and ends."""
    config = tiny_models.glm4v_config().to_dict() | {"architectures": ["Glm4vForConditionalGeneration"]}
    config["text_config"] |= {"hidden_size": 256, "intermediate_size": 1024, "max_position_embeddings": 2048}
    config["text_config"]["rope_parameters"]["mrope_section"] = [4, 6, 6]
    config["vision_config"] |= {"out_hidden_size": 256, "intermediate_size": 1024}
    folder = tmp_path_factory.mktemp("random-glm4v")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("plan", ["bf16", "int4", "int8", "int8-kv"])
def test_what_is_predicted_is_what_random_weights_take(random_glm4v, plan, monkeypatch):
    monkeypatch.setattr(
        upcast, "is_emulated", lambda dtype: False
    )  # nobody predicts what widened products take
    found = check_plan(str(random_glm4v), plan, context=1200, screen=(280, 560), device="cpu")
    assert found["weights_error"] == 0
    assert found["weights_within"]
    assert found["image_tokens"] == 10 * 20
    assert found["context"] == pytest.approx(1200, abs=3)
    room = -(-found["context"] // 128) * 128
    assert found["cache_measured"] / found["cache_predicted"] == pytest.approx(room / found["context"])
    # small tensors that nobody predicts weigh more here
    assert found["peak_error"] == pytest.approx(0, abs=0.25)


def test_the_command_measures_its_predictions_and_says_how_far_they_are_off(random_glm4v, tmp_path, capsys):
    given = ["--check", "--plans", "int4,gptq", "--context", "600", "--screen", "none", "--device", "cpu"]
    code = main(["fit", str(random_glm4v), *given, "--output", str(tmp_path)])
    found = json.loads((tmp_path / "fit.json").read_text())
    (record,) = found["records"]  # gptq calibrates, which random weights are not
    assert record["plan"] == "int4"
    assert record["weights"] == found["settings"]["weights"] == "random"
    assert code == (not record["peak_within"])
    assert "Plan (random weights)" in " ".join(capsys.readouterr().out.split())
    assert main(["fit", "pocket"]) == 2
    assert "--memory 8GB" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("plan", ["bf16", "int4", "int8-kv"])
def test_the_9b_with_random_weights_takes_what_is_predicted(plan):
    found = check_plan("autoglm-phone-9b", plan, context=4096, screen=(1080, 2400), device="cuda")
    assert found["weights_within"]
    assert found["peak_within"]


def test_cards_are_found_by_their_makers_names():
    assert find_card("NVIDIA H200").name == "h200"
    assert find_card("RTX 4090").memory_bytes == 24 << 30
    with pytest.raises(LabError, match="Known: rtx-4060"):
        find_card("voodoo")
    with pytest.raises(LabError, match="1 or more"):
        needs("pocket", ["bf16"], context=0)
