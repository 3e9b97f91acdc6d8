"""From a folder and a plan to an engine, and what is refused on the way, with its reason."""

import json
import shutil

import numpy as np
import pytest
import tiny_models
import torch
from PIL import Image

import labkit
from labkit.common.errors import HubError, LabError
from labkit.loading.load import load
from labkit.loading.placement import check_memory, staging_device
from labkit.loading.prepare import choose_device
from labkit.measure.cost import bytes_by_role
from labkit.models import get_spec
from labkit.models.checkpoint import Checkpoint, LoadError
from labkit.models.hub import _ask_for
from labkit.plans.plan import PlanError, QuantizationPlan
from labkit.plans.quantize import weights_bytes

HELLO = [{"role": "user", "content": "hello"}]


def save(folder, model, words, images=None):
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="200KB")
    words.save_pretrained(folder)
    if images is not None:
        images.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def glm4v_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny-glm4v")
    return save(folder, tiny_models.glm4v(), tiny_models.tokenizer(), tiny_models.image_processor())


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("tiny-llama"), tiny_models.llama(), tiny_models.tokenizer())


@pytest.fixture
def broken(llama_folder, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(llama_folder, tmp_path / "copy")


@pytest.fixture(scope="module")
def pocket_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny-pocket")
    model, processor = tiny_models.pocket()
    model.to(torch.bfloat16).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def screen_and_voice():
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 255, (168, 112, 3), dtype=np.uint8))
    voice = rng.normal(size=8000).astype(np.float32) * 0.1
    return [
        {"role": "user", "content": [{"type": "image", "image": picture}, {"type": "audio", "audio": voice}]}
    ]


def test_a_folder_becomes_an_engine_that_answers_as_the_model_saved(llama_folder):
    engine = load(llama_folder, "fp32", "cpu", progress=False)
    model = tiny_models.llama().to(torch.bfloat16).float()
    inputs = engine.prepare(HELLO)
    expected = model.generate(**inputs, max_new_tokens=20, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert engine.generate(HELLO, max_new_tokens=20).token_ids == expected.tolist()
    assert engine.dtype == torch.float32
    assert engine.spec.name == llama_folder.name
    assert engine.load_s > 0


def test_glm4v_takes_images_without_torchvision(glm4v_folder):
    engine = labkit.load(glm4v_folder, "fp32", "cpu", progress=False)
    picture = Image.fromarray(np.zeros((56, 84, 3), dtype=np.uint8))
    messages = [
        {"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "?"}]}
    ]
    assert engine.prepare(messages)["image_grid_thw"].tolist() == [[1, 4, 6]]
    assert engine.generate(messages, max_new_tokens=5).completion_tokens == 5


def test_the_pocket_sees_and_hears_from_its_folder(pocket_folder):
    engine = load(pocket_folder, "fp32", "cpu", progress=False)
    assert engine.modalities == {"image", "audio"}
    answer = engine.generate(screen_and_voice(), max_new_tokens=12)
    again = engine.generate_batch([HELLO, screen_and_voice()], max_new_tokens=12)[1]
    assert answer.token_ids == again.token_ids
    assert {"speech", "cross_modal", "vision", "decoder", "projector"} <= set(engine.roles.values())


def test_another_familys_model_listens_through_transformers_own_processor(tmp_path, capfd):
    model, processor = tiny_models.glm_asr()
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    engine = load(tmp_path, "fp32", "cpu", progress=False)
    assert engine.modalities == {"audio"}
    voice = {"type": "audio", "audio": np.random.default_rng(0).normal(size=24_000).astype(np.float32) * 0.1}
    spoken = [{"role": "user", "content": [voice, {"type": "text", "text": "write it down"}]}]
    capfd.readouterr()
    alone = [engine.generate(messages, max_new_tokens=10).token_ids for messages in (spoken, HELLO)]
    assert capfd.readouterr().err == ""
    inputs = engine.prepare(spoken)
    expected = engine.model.generate(**inputs, max_new_tokens=10, do_sample=False)
    assert alone[0] == expected[0, inputs["input_ids"].shape[1] :].tolist()
    assert [one.token_ids for one in engine.generate_batch([spoken, HELLO], max_new_tokens=10)] == alone


def test_a_processor_that_cannot_be_built_leaves_text_and_says_why(tmp_path):
    model, processor = tiny_models.glm_asr()
    model.save_pretrained(tmp_path)
    processor.tokenizer.save_pretrained(tmp_path)
    engine = load(tmp_path, "fp32", "cpu", progress=False)
    assert engine.generate(HELLO, max_new_tokens=3).completion_tokens == 3
    voice = {"type": "audio", "audio": np.ones(16_000, np.float32)}
    with pytest.raises(LabError, match="does not take audio input: its processor cannot be built here"):
        engine.generate([{"role": "user", "content": [voice]}])


@pytest.mark.parametrize("plan", ["bf16", "fp16", "int8", "int8-dynamic", "int4", "nf4", "llm-int8"])
@pytest.mark.parametrize("which", ["glm4v_folder", "pocket_folder"])
def test_every_preset_answers_and_holds_the_bytes_it_predicts(which, plan, request):
    engine = load(request.getfixturevalue(which), plan, "cpu", progress=False)
    messages = screen_and_voice() if "audio" in engine.modalities else HELLO
    assert engine.generate(messages, max_new_tokens=4).completion_tokens == 4
    assert weights_bytes(engine.model) == engine.resolved.predicted_bytes
    assert sum(bytes_by_role(engine).values()) == engine.resolved.predicted_bytes


def test_fewer_bits_are_fewer_bytes(llama_folder):
    sizes = [
        weights_bytes(load(llama_folder, plan, "cpu", progress=False).model)
        for plan in ("fp32", "bf16", "int8", "int4")
    ]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == pytest.approx(2 * sizes[1], rel=1e-3)


def test_a_plan_for_roles_finds_them(glm4v_folder, tmp_path):
    plan = tmp_path / "mixed.yaml"
    plan.write_text("name: mixed\nrules:\n- {role: decoder, scheme: int8}\ndefault: fp32\n")
    engine = load(glm4v_folder, plan, "cpu", progress=False)
    assert {engine.roles[name] for name in engine.resolved.schemes} == {"decoder"}
    assert len(engine.resolved.schemes) == 2 * 6


def test_the_dtype_of_the_rest_can_be_chosen(llama_folder):
    assert load(llama_folder, "int8", "cpu", dtype="fp32", progress=False).dtype == torch.float32
    with pytest.raises(LoadError, match="unknown dtype 'fp8'; known: fp32, fp16, bf16"):
        load(llama_folder, "int8", "cpu", dtype="fp8")


def test_a_wrong_plan_is_refused_before_weights_are_read(llama_folder, monkeypatch):
    monkeypatch.setattr(Checkpoint, "tensors", lambda *_: pytest.fail("the weights were read"))
    with pytest.raises(PlanError, match="presets are fp32"):
        load(llama_folder, "int5", "cpu")
    plan = QuantizationPlan.from_dict({"name": "x", "rules": [{"role": "speech", "scheme": "int8"}]})
    with pytest.raises(PlanError, match=r"rule 1 .*matches no Linear"):
        load(llama_folder, plan, "cpu")
    plan = QuantizationPlan.uniform("int4", group_size=96)
    with pytest.raises(LabError, match="group_size"):
        load(llama_folder, plan, "cpu")


def test_a_device_that_is_not_there_is_refused(monkeypatch):
    assert choose_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == torch.device("cpu")
    for name, message in (
        ("cuda", "no usable GPU"),
        ("gpu", "unknown device 'gpu'"),
        ("mps", "not supported"),
    ):
        with pytest.raises(LoadError, match=message):
            choose_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("cuda") == torch.device("cuda:0")
    with pytest.raises(LoadError, match="this machine has 2 GPUs"):
        choose_device("cuda:2")


def test_what_cannot_fit_is_refused_with_both_figures():
    plan = QuantizationPlan.preset("fp32")
    with pytest.raises(LoadError, match=r"pocket under the plan fp32 needs 9{6}\.0 GB .* GB free"):
        check_memory(999_999 * 10**9, torch.device("cpu"), get_spec("pocket"), plan)


def test_weights_are_read_where_there_is_room(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda:0")
    monkeypatch.setattr(
        "labkit.loading.placement.free_bytes", lambda device: {"cpu": 30, "cuda": 20}[device.type]
    )
    assert staging_device(19, gpu, "m") == gpu
    assert staging_device(25, gpu, "m") == cpu
    assert staging_device(25, cpu, "m") == cpu
    with pytest.raises(LoadError, match="reading m takes"):
        staging_device(35, gpu, "m")


def test_a_missing_shard_is_named(broken):
    sorted(broken.glob("model-*.safetensors"))[1].unlink()
    with pytest.raises(LoadError, match=r"has no model-00002-of-\d+\.safetensors"):
        load(broken, "fp32", "cpu")


def test_a_cut_off_shard_is_named(broken):
    path = sorted(broken.glob("model-*.safetensors"))[0]
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(LoadError, match=r"model-00001-of-\d+\.safetensors is broken or cut off"):
        load(broken, "fp32", "cpu")


def test_pickled_weights_are_never_read(broken):
    for path in broken.glob("*.safetensors*"):
        path.unlink()
    torch.save({}, broken / "pytorch_model.bin")
    with pytest.raises(LoadError, match=r"pytorch_model\.bin is a pickle, which is never loaded"):
        load(broken, "fp32", "cpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": None}, "names no model_type"),
        ({"model_type": "nonesuch"}, r"no architecture 'nonesuch'$"),
        ({"model_type": "x", "auto_map": {"AutoModel": "x.X"}}, "brings its own code, which is not run"),
        ({"hidden_size": "wide"}, r"config\.json of copy is not valid"),
        ({"num_hidden_layers": 3}, r"lack \d+ tensors .*layers\.2\."),
        ({"intermediate_size": 512}, "cannot be loaded"),
        ({"model_type": "t5", "architectures": ["T5Model"]}, "not a model that generates text"),
    ],
)
def test_a_wrong_configuration_says_what_is_wrong(broken, change, message):
    path = broken / "config.json"
    facts = json.loads(path.read_text()) | change
    path.write_text(json.dumps({key: value for key, value in facts.items() if value is not None}))
    with pytest.raises(LoadError, match=message):
        load(broken, "fp32", "cpu", progress=False)


def test_a_broken_config_or_tokenizer_is_named(broken):
    (broken / "tokenizer.json").write_text("{")
    with pytest.raises(LoadError, match="the processor of copy cannot be built"):
        load(broken, "fp32", "cpu", progress=False)
    (broken / "config.json").write_text("{")
    with pytest.raises(LoadError, match=r"config\.json is broken"):
        load(broken, "fp32", "cpu")


def _no_hub(*_, **__):
    raise OSError("no connection\nand more")


def test_a_hub_id_that_cannot_be_read_is_an_error_of_one_line(monkeypatch):
    monkeypatch.setattr("labkit.models.hub._ask_for", _no_hub)
    expected = r"owner/model .* cannot be read from the hub \(no connection\)"
    with pytest.raises(HubError, match=expected) as caught:
        load("owner/model", "fp32", "cpu")
    assert "\n" not in str(caught.value)


def test_the_9b_models_sizes_are_known_without_the_hub(monkeypatch):
    monkeypatch.setattr("labkit.models.hub._ask_for", _no_hub)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    skeleton = Checkpoint(get_spec("autoglm-phone-9b")).skeleton()
    assert sum(one.numel() for one in skeleton.parameters()) == pytest.approx(10.293e9, rel=1e-4)
    for name, size in (("fp32", 41.2e9), ("bf16", 20.6e9)):
        resolved = QuantizationPlan.preset(name).resolve(skeleton)
        assert resolved.predicted_bytes == pytest.approx(size, rel=2e-3)
    with pytest.raises(HubError, match="AutoGLM-Phone-9B"):
        load("autoglm-phone-9b", "int4", "cpu")


def test_nobody_at_an_address_is_found_out_at_once():
    with pytest.raises(OSError, match="refused"):
        _ask_for("http://127.0.0.1:9/x")


def test_a_plan_that_calibrates_takes_phonetaps_items_by_itself(pocket_folder, glm4v_folder, tmp_path):
    for folder in (pocket_folder, glm4v_folder):
        engine = load(folder, "gptq", "cpu", calibration=4, progress=False)
        assert {scheme.name for scheme in engine.resolved.schemes.values()} == {"gptq"}
        assert weights_bytes(engine.model) == engine.resolved.predicted_bytes
        assert engine.generate(HELLO, max_new_tokens=3).completion_tokens <= 3
    work = tmp_path / "work"
    first = load(glm4v_folder, "gptq", "cpu", calibration=4, work_folder=work, progress=False)
    assert len(list(work.glob("*.safetensors"))) == len(first.resolved.schemes)


def test_a_text_model_is_calibrated_on_given_tokens_only(llama_folder):
    with pytest.raises(
        LoadError, match=r"gptq \(model.* needs calibration batches, and PhoneTap's are screens"
    ):
        load(llama_folder, "gptq", "cpu", progress=False)
    with pytest.raises(LoadError, match="PhoneTap's are screenshots"):
        load(llama_folder, "gptq", "cpu", calibration=8, progress=False)
    tokens = [torch.arange(40)[None], torch.arange(60, 90)[None]]
    engine = load(llama_folder, "gptq", "cpu", calibration=tokens, progress=False)
    assert engine.generate(HELLO, max_new_tokens=3).completion_tokens <= 3


@pytest.mark.parametrize("count", [0, -1, True])
def test_a_number_of_calibration_items_is_one_or_more(glm4v_folder, count):
    with pytest.raises(LoadError, match="a number of items from 1 on"):
        load(glm4v_folder, "gptq", "cpu", calibration=count, progress=False)


def test_an_unknown_model_is_refused():
    with pytest.raises(LabError, match="Did you mean pocket"):
        load("pokcet", "fp32")


def test_transformers_logging_is_as_it_was(llama_folder):
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    load(llama_folder, "fp32", "cpu", progress=False)
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
