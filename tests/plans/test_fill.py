"""Loading shard by shard: what is held, that it is the same model, random weights, and a split over devices."""

import logging

import numpy as np
import pytest
import tiny_models
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

import labkit
from labkit.common.errors import LabError
from labkit.loading.load import load
from labkit.loading.placement import check_map, connect_, split_by_layers
from labkit.loading.prepare import choose_devices
from labkit.measure.cost import measure
from labkit.measure.fit_check import LiveBytes
from labkit.models import find_roles, get_spec
from labkit.models.checkpoint import Checkpoint, LoadError
from labkit.models.spec import ModelSpec
from labkit.models.weights import RandomSource
from labkit.plans.plan import QuantizationPlan
from labkit.plans.quantize import quantize_, weights_bytes
from labkit.quantization import get_scheme

HELLO = [{"role": "user", "content": "hello"}]
MIXED = QuantizationPlan.from_dict(
    {
        "name": "mixed",
        "rules": [
            {"role": "lm_head", "scheme": "int8"},
            {"role": "embedding", "modules": "embedding", "scheme": "int8"},
            {"role": "decoder", "linear": "down_proj", "scheme": "nf4"},
            {"role": "decoder", "scheme": "int4"},
        ],
    }
)


@pytest.fixture(scope="module")
def deep_folder(tmp_path_factory):
    """Twelve layers in shards of about one layer."""
    config = tiny_models.llama_config()
    config.num_hidden_layers = 12
    folder = tmp_path_factory.mktemp("deep")
    model = tiny_models.random_model(LlamaForCausalLM, config).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="400KB")
    tiny_models.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def glm4v_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("glm4v")
    tiny_models.glm4v().to(torch.bfloat16).save_pretrained(folder, max_shard_size="200KB")
    tiny_models.tokenizer().save_pretrained(folder)
    tiny_models.image_processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pocket_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pocket")
    model, processor = tiny_models.pocket()
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="200KB")
    processor.save_pretrained(folder)
    return folder


def loaded_whole(folder, plan, batches=None):
    """The model as it was loaded before: read whole by transformers, then quantized."""
    model = Checkpoint(get_spec(folder)).weights(torch.device("cpu"), progress=False)
    quantize_(model, plan, batches, device="cpu", progress=False)
    return model


def assert_same(one, other):
    left, right = (dict(m.state_dict()) | dict(m.named_buffers()) for m in (one, other))
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype, name
        assert torch.equal(tensor, right[name]), name
    assert weights_bytes(one) == weights_bytes(other)


@pytest.mark.parametrize("plan", ["int4", "int8", "nf4"])
def test_no_more_is_held_than_the_quantized_model_one_shard_and_one_modules_work(deep_folder, plan):
    shards = [path.stat().st_size for path in deep_folder.glob("*.safetensors")]
    assert len(shards) > 8
    with LiveBytes() as live:
        engine = load(deep_folder, plan, "cpu", progress=False)
    rows = max(one.out_features for one in engine.model.modules() if hasattr(one, "out_features"))
    widest = torch.nn.Linear(128, rows, bias=False, dtype=torch.bfloat16)
    with LiveBytes() as alone:
        get_scheme(plan).quantize_linear(widest)
    assert live.now_bytes == pytest.approx(weights_bytes(engine.model), rel=0.02)
    allowed = weights_bytes(engine.model) + max(shards) + alone.peak_bytes
    assert live.peak_bytes <= allowed < sum(shards)
    with LiveBytes() as before:  # what reading it whole would take, counted alike
        whole = [load_file(path) for path in sorted(deep_folder.glob("*.safetensors"))]
    assert before.peak_bytes == pytest.approx(sum(shards), rel=0.01)
    assert len(whole) == len(shards)


def test_an_unquantized_model_is_held_once(deep_folder):
    with LiveBytes() as live:
        engine = load(deep_folder, "fp32", "cpu", progress=False)
    largest = max(one.nbytes for one in engine.model.parameters())
    assert live.peak_bytes <= weights_bytes(engine.model) + largest


def test_calibrated_linears_wait_in_their_files(deep_folder):
    tokens = [torch.arange(24)[None] % 250]
    with LiveBytes() as live:
        engine = load(deep_folder, "gptq", "cpu", calibration=tokens, progress=False)
    assert_same(engine.model, loaded_whole(deep_folder, "gptq", tokens))
    stored = sum(path.stat().st_size for path in deep_folder.glob("*.safetensors"))
    names = [name for name in engine.resolved.schemes if "layers.11" in name]
    with LiveBytes() as alone:  # the widest Linear, on as many inputs
        tiny = torch.nn.ModuleDict({"only": torch.nn.Linear(256, 512, bias=False)})
        tiny.forward = lambda x: tiny["only"](x)
        quantize_(tiny, "gptq", [torch.randn(24, 256)], progress=False)
    assert names
    assert live.peak_bytes <= weights_bytes(engine.model) + alone.peak_bytes + 2**20
    assert live.peak_bytes - alone.peak_bytes < stored


@pytest.mark.parametrize("plan", ["fp32", "fp16", "int8", "int4", "nf4", "llm-int8", MIXED])
@pytest.mark.parametrize("which", ["glm4v_folder", "pocket_folder"])
def test_the_model_is_the_one_that_reading_it_whole_gives(which, plan, request):
    folder = request.getfixturevalue(which)
    assert_same(load(folder, plan, "cpu", progress=False).model, loaded_whole(folder, plan))


@pytest.mark.parametrize("plan", ["gptq", "awq", "article"])
def test_calibrated_too(pocket_folder, plan):
    engine = load(pocket_folder, plan, "cpu", calibration=3, progress=False)
    from labkit.loading.calibration import default_calibration

    batches = default_calibration(engine.processor, engine.modalities, 3, model=engine.model)
    assert_same(engine.model, loaded_whole(pocket_folder, plan, batches))


def test_tied_weights_stay_tied_and_a_tie_that_a_plan_cuts_is_cut(tmp_path):
    config = tiny_models.llama_config()
    config.tie_word_embeddings = True
    tiny_models.random_model(LlamaForCausalLM, config).save_pretrained(tmp_path)
    tiny_models.tokenizer().save_pretrained(tmp_path)
    whole = load(tmp_path, "bf16", "cpu", progress=False).model
    assert whole.lm_head.weight is whole.model.embed_tokens.weight
    rule = {"match": "lm_head", "scheme": "int8"}
    plan = QuantizationPlan.from_dict({"name": "cut", "rules": [rule]})
    assert_same(load(tmp_path, plan, "cpu", progress=False).model, loaded_whole(tmp_path, plan))


def test_a_run_that_was_stopped_reads_only_what_is_missing(glm4v_folder, tmp_path, monkeypatch):
    labkit.quantize_to(glm4v_folder, "int4", tmp_path / "whole", "cpu", progress=False)
    quantize = type(get_scheme("int4")).fill
    done = []

    def stopped(self, module, weight):
        if len(done) == 9:
            raise KeyboardInterrupt
        done.append(module)
        return quantize(self, module, weight)

    monkeypatch.setattr(type(get_scheme("int4")), "fill", stopped)
    with pytest.raises(KeyboardInterrupt, match="9 of"):
        labkit.quantize_to(glm4v_folder, "int4", tmp_path / "made", "cpu", progress=False)
    monkeypatch.undo()
    made = labkit.quantize_to(glm4v_folder, "int4", tmp_path / "made", "cpu", progress=False)
    assert made.continued == 9
    assert_same(made.engine.model, load(tmp_path / "whole", device="cpu", progress=False).model)


def test_architectures_that_transformers_puts_together_are_read_whole(deep_folder, monkeypatch):
    monkeypatch.setattr("labkit.loading.load.has_plain_names", lambda _: False)
    engine = load(deep_folder, "int4", "cpu", progress=False)
    monkeypatch.undo()
    assert_same(engine.model, load(deep_folder, "int4", "cpu", progress=False).model)


# -- random weights ------------------------------------------------------------------------------------------


def test_random_weights_need_nothing_but_a_configuration(glm4v_folder, monkeypatch):
    monkeypatch.setattr("labkit.models.hub._ask_for", lambda *_: pytest.fail("the hub was asked"))
    config = tiny_models.glm4v_config().to_dict() | {"architectures": ["Glm4vForConditionalGeneration"]}
    spec = ModelSpec("published", "nobody/published", published=config)
    engine = load(spec, "int4", "cpu", weights="random", progress=False)
    assert engine.weights == "random"
    assert weights_bytes(engine.model) == engine.resolved.predicted_bytes
    picture = Image.fromarray(np.zeros((56, 84, 3), dtype=np.uint8))
    parts = [{"type": "image", "image": picture}, {"type": "text", "text": "17 4 250"}]
    inputs = engine.prepare([{"role": "user", "content": parts}])
    assert inputs["input_ids"][0, -3:].tolist() == [17, 4, 250]
    assert int(inputs["mm_token_type_ids"].sum()) == int(inputs["image_grid_thw"].prod()) // 4
    answer = engine.generate([{"role": "user", "content": parts}], max_new_tokens=4)
    assert answer.text.split() == [str(one) for one in answer.token_ids]
    cost = measure(engine, prompts=2, warmup=0, max_new_tokens=3)
    assert cost["prompt_tokens"] > 100
    with pytest.raises(LabError, match="a prompt is token ids, such as '17 4 250'; not 'hello'"):
        engine.generate(HELLO)
    with pytest.raises(LabError, match="stands for a picture"):
        engine.generate([{"role": "user", "content": str(config["image_token_id"])}])
    with pytest.raises(LabError, match="no token 99999"):
        engine.generate([{"role": "user", "content": "99999"}])


def test_random_weights_are_seeded_normal_and_norms_are_one(deep_folder, caplog):
    with caplog.at_level(logging.ERROR):
        one, again = (load(deep_folder, "fp32", "cpu", weights="random", progress=False) for _ in "ab")
    assert_same(one.model, again.model)
    weight = one.model.model.layers[3].mlp.down_proj.weight
    assert weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not torch.equal(weight, one.model.model.layers[4].mlp.down_proj.weight)
    assert torch.equal(one.model.model.norm.weight, torch.ones(128))
    assert one.generate(HELLO, max_new_tokens=4).completion_tokens <= 4  # the folder has a tokenizer
    other = RandomSource(Checkpoint(get_spec(deep_folder)).skeleton(), seed=1)
    assert not torch.equal(other.read("model.layers.3.mlp.down_proj.weight").float(), weight)


def test_random_weights_hold_the_quantized_model_and_one_module(deep_folder):
    with LiveBytes() as live:
        engine = load(deep_folder, "int4", "cpu", weights="random", progress=False)
    stored = sum(path.stat().st_size for path in deep_folder.glob("*.safetensors"))
    assert live.peak_bytes < 0.75 * stored
    assert engine.generate(HELLO, max_new_tokens=2).completion_tokens <= 2


def test_random_weights_are_not_calibrated_nor_saved_nor_called_otherwise(deep_folder, tmp_path):
    with pytest.raises(LoadError, match="calibrates, which says nothing on random weights"):
        load(deep_folder, "gptq", "cpu", weights="random")
    with pytest.raises(LoadError, match="it is 'random', or None"):
        load(deep_folder, "int4", "cpu", weights="zeros")
    engine = load(deep_folder, "int4", "cpu", weights="random", progress=False)
    with pytest.raises(labkit.LabError, match="random weights"):
        labkit.save(engine, tmp_path / "saved")


def test_what_making_takes_must_fit_beside_the_model(deep_folder, monkeypatch):
    size = load(deep_folder, "int4", "cpu", progress=False).resolved.predicted_bytes
    largest = max(one.numel() for one in Checkpoint(get_spec(deep_folder)).skeleton().parameters())
    for free, fits in ((size + 3 * largest + 1, True), (size + 3 * largest - 1, False)):
        monkeypatch.setattr("labkit.loading.placement.free_bytes", lambda device, free=free: free)
        if fits:
            load(deep_folder, "int4", "cpu", progress=False)
        else:
            with pytest.raises(LoadError, match=r"for its weights and 0\.0 GB to make them"):
                load(deep_folder, "int4", "cpu", progress=False)


# -- several devices -----------------------------------------------------------------------------------------


def split(model, plan, count):
    skeleton = Checkpoint(get_spec(model)).skeleton()
    resolved = QuantizationPlan.preset(plan).resolve(skeleton, roles=find_roles(skeleton))
    devices = [torch.device("cuda", index) for index in range(count)]
    return skeleton, resolved, split_by_layers(skeleton, resolved, devices)


@pytest.mark.parametrize("plan", ["bf16", "int4"])
@pytest.mark.parametrize("count", [2, 4])
def test_the_9bs_layers_are_dealt_out_evenly(plan, count, monkeypatch):
    monkeypatch.setattr("labkit.models.spec.ModelSpec.availability", lambda self: "on the hub")
    checkpoint = Checkpoint(get_spec("autoglm-phone-9b"), ask_hub=False)
    skeleton = checkpoint.skeleton()
    resolved = QuantizationPlan.preset(plan).resolve(skeleton, roles=find_roles(skeleton))
    placed = split_by_layers(skeleton, resolved, [torch.device("cuda", index) for index in range(count)])
    sizes = placed.bytes_by_device(resolved)
    assert sum(sizes.values()) == resolved.predicted_bytes
    layer = resolved.bytes_by_role["decoder"] / 40
    rest = sum(part.bytes for part in resolved.parts if ".layers." not in part.module)
    first, *others = sizes.values()
    fair = max(rest, sum(sizes.values()) / count)
    assert abs(first - fair) <= layer
    assert max(others) - min(others) <= 2 * layer
    at = [placed(f"model.language_model.layers.{index}").index for index in range(40)]
    assert at == sorted(at)
    assert set(at) | {0} == set(range(count))
    for name in ("lm_head", "model.language_model.embed_tokens", "model.visual.blocks.3.mlp"):
        assert placed(name).index == 0
    assert placed("model.language_model.norm").index == count - 1
    inside = "model.language_model.layers.39.mlp.gate_up_proj"
    assert placed(inside) == placed("model.language_model.layers.39")


def test_a_split_that_cannot_be_is_refused(glm4v_folder):
    with pytest.raises(LabError, match="2 decoder layers cannot be split over 3"):
        split(glm4v_folder, "bf16", 3)
    skeleton = Checkpoint(get_spec(glm4v_folder)).skeleton()
    first = torch.device("cuda:0")
    for parts, message in (
        ({"model.nothing": "cuda:1"}, "which the model does not have"),
        ({"model.language_model.layers.0.mlp": "cuda:1"}, "name whole layers"),
        ({"lm_head": "cuda:1"}, "the head .lm_head. must be on the first device"),
        ({"model": "cuda:1"}, "the input embedding .* must be on the first device"),
    ):
        with pytest.raises(LabError, match=message):
            check_map(skeleton, parts, first)
    with pytest.raises(LoadError, match="only GPUs share a model"):
        choose_devices("cpu,cpu")


def test_what_crosses_is_moved_and_what_all_layers_get_is_moved_once(glm4v_folder, monkeypatch):
    """On the meta device, where a move can be seen but not computed."""
    skeleton, _, placed = split(glm4v_folder, "bf16", 2)
    moves = []
    connect_(skeleton, placed)
    layer = skeleton.model.language_model.layers[1]
    hook = next(iter(layer._forward_pre_hooks.values()))
    assert hook.device == torch.device("cuda", 1)
    monkeypatch.setattr(hook, "device", torch.device("meta"))
    to = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda t, d: moves.append(t) or to(t, d))
    hidden, table = torch.ones(1, 3, 128), (torch.ones(1, 3, 16), torch.ones(1, 3, 16))
    args, kwargs = hook(layer, (hidden,), {"position_embeddings": table, "past_key_values": "cache"})
    assert args[0].is_meta
    assert kwargs["past_key_values"] == "cache"
    hook(layer, (torch.ones(1, 3, 128),), {"position_embeddings": table})
    assert len(moves) == 4


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("plan", ["bf16", "int4", "int8"])
def test_the_second_gpu_answers_as_the_first(glm4v_folder, plan):
    engines = [load(glm4v_folder, plan, device, progress=False) for device in ("cuda:0", "cuda:1")]
    conversation = [{"role": "user", "content": "hello"}]
    first, second = (engine.generate(conversation, max_new_tokens=20) for engine in engines)
    assert second.token_ids == first.token_ids
    assert [engine.route for engine in engines] == ["one CUDA graph a token"] * 2


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("plan", ["bf16", "int4", "int8"])
def test_two_gpus_answer_as_one(glm4v_folder, plan):
    one = load(glm4v_folder, plan, "cuda:0", progress=False)
    two = load(glm4v_folder, plan, "cuda:0,cuda:1", progress=False)
    assert {p.device.index for p in (*two.model.parameters(), *two.model.buffers())} == {0, 1}
    for text in ("hello", "another"):
        conversation = [{"role": "user", "content": text}]
        answers = [engine.generate(conversation, max_new_tokens=20, logprobs=20) for engine in (one, two)]
        for alone, shared in zip(answers[0].logprobs, answers[1].logprobs):
            known = dict(shared.top)
            both = [(value, known[token]) for token, value in alone.top if token in known]
            assert len(both) >= 15
            assert all(value == pytest.approx(other, abs=0.25) for value, other in both)
            if shared.token != alone.token:  # two as likely: one GPU's captured step sums in another order
                break
