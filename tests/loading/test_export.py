"""Exports hold the lab's own integers in the layout that the format's readers expect, and refuse the rest."""

import json
import os
import re

import pytest
import tiny_models
import torch
from checkpoint_models import PLANS, calibration_for, save_glm4v, save_llama, save_pocket
from safetensors.torch import load_file

from labkit.cli.main import main
from labkit.common.errors import CheckpointError, LabError
from labkit.loading.export import export
from labkit.loading.export.packing import pack_words, unpack_words
from labkit.loading.load import load
from labkit.loading.save import save
from labkit.plans.plan import QuantizationPlan
from labkit.quantization.affine import sqnr_db

LAYER = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("models") / "llama", vocab_size=320)


@pytest.fixture(scope="module")
def made(llama, tmp_path_factory):
    """(plan) -> its engine and its folder, made once."""
    top, done = tmp_path_factory.mktemp("quantized"), {}

    def make(plan):
        if plan.name not in done:
            engine = load(llama, plan, "cpu", calibration=calibration_for("llama"), progress=False)
            done[plan.name] = engine, save(engine, top / plan.name, progress=False)
        return done[plan.name]

    return make


def tensors_of(folder):
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def int4(bits=4, symmetric=True, group_size=64):
    return QuantizationPlan.uniform("int4", num_bits=bits, symmetric=symmetric, group_size=group_size)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("length", [32, 40, 64])
def test_packing_is_exact_at_every_width(bits, length):
    codes = torch.randint(0, 2**bits, (5, length), dtype=torch.uint8, generator=torch.manual_seed(0))
    packed = pack_words(codes, bits)
    assert packed.shape == (5, -(-length * bits // 32))
    assert packed.dtype == torch.int32
    assert torch.equal(unpack_words(packed, bits, length), codes)


def test_packing_puts_the_first_code_into_the_lowest_bits():
    assert pack_words(torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]], dtype=torch.uint8), 4).tolist() == [
        [0x87654321 - 2**32]
    ]
    # 3 bits: the eleventh code straddles two words
    codes = torch.zeros(1, 32, dtype=torch.uint8)
    codes[0, 10] = 0b101
    assert pack_words(codes, 3).tolist() == [[0b01 << 30, 0b1, 0]]


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_compressed_tensors_hold_the_same_integers(made, tmp_path, bits, symmetric):
    engine, folder = made(int4(bits, symmetric))
    done = export(folder, tmp_path / "out", progress=False)
    module, stored = engine.model.get_submodule(LAYER), tensors_of(done.folder)
    assert done.quantized == 15
    packed = stored[f"{LAYER}.weight_packed"]
    assert stored[f"{LAYER}.weight_shape"].tolist() == [128, 256]
    assert torch.equal(unpack_words(packed, bits, 256), module.codes)
    assert torch.equal(stored[f"{LAYER}.weight_scale"], module.scale)
    zero_point = stored.get(f"{LAYER}.weight_zero_point")
    if symmetric:
        assert zero_point is None
    else:
        assert torch.equal(unpack_words(zero_point.T.contiguous(), bits, 128).T, module.zero_point)
    [group] = config_of(done.folder)["quantization_config"]["config_groups"].values()
    assert group["weights"] == {
        "num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group", "group_size": 64,
        "dynamic": False,
    }  # fmt: skip
    assert group["input_activations"] is None
    assert len(group["targets"]) == 15
    assert f"{LAYER}.weight" not in stored
    assert stored["model.norm.weight"].dtype == torch.bfloat16
    assert not any("inv_freq" in name for name in stored)


def test_each_kind_is_a_group_of_its_own_and_the_rest_is_ignored(made, tmp_path):
    plan = QuantizationPlan.from_dict(
        {
            "name": "groups",
            "rules": [
                {"match": "re:.*mlp.*", "scheme": "int4", "symmetric": True, "group_size": 32},
                {"match": "re:.*[qkv]_proj", "scheme": "int8-dynamic"},
                {"match": "re:.*layers.0.*o_proj", "scheme": "int8"},
                {"match": "re:.*layers.1.*o_proj", "scheme": "fp32"},
            ],
        }
    )
    engine, folder = made(plan)
    done = export(folder, tmp_path / "out", progress=False)
    config = config_of(done.folder)["quantization_config"]
    groups = list(config["config_groups"].values())
    assert [(group["format"], group["weights"]["num_bits"], len(group["targets"])) for group in groups] == [
        ("int-quantized", 8, 6),
        ("pack-quantized", 8, 1),
        ("pack-quantized", 4, 6),
    ]
    assert groups[0]["input_activations"] == {
        "num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True
    }  # fmt: skip
    assert config["format"] == "mixed-precision"
    assert config["ignore"] == ["model.layers.1.self_attn.o_proj", "lm_head"]
    stored = tensors_of(done.folder)
    name = "model.layers.0.self_attn.q_proj"
    assert torch.equal(stored[f"{name}.weight"], engine.model.get_submodule(name).weight_int8)
    assert stored[f"{name}.weight_scale"].shape == (128, 1)
    assert stored["model.layers.1.self_attn.o_proj.weight"].dtype == torch.float32
    assert done.notes == [
        "Linears in fp32 are written so; engines load them in bf16, as all else that is not quantized."
    ]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq_holds_the_same_integers_and_zero_points_minus_one(made, tmp_path, bits, symmetric):
    engine, folder = made(int4(bits, symmetric))
    done = export(folder, tmp_path / "out", format="gptq", progress=False)
    module, stored = engine.model.get_submodule(LAYER), tensors_of(done.folder)
    assert torch.equal(unpack_words(stored[f"{LAYER}.qweight"].T, bits, 256), module.codes)
    config = json.loads((done.folder / "quantize_config.json").read_text())
    assert config == config_of(done.folder)["quantization_config"]
    first = config["checkpoint_format"] == "gptq"
    zero_point = unpack_words(stored[f"{LAYER}.qzeros"], bits, 128).T
    assert torch.equal(zero_point.int() + first, module.zero_point)
    assert torch.equal(stored[f"{LAYER}.scales"].T.float(), module.scale.float())
    assert stored[f"{LAYER}.scales"].dtype == torch.float16
    assert stored[f"{LAYER}.g_idx"].tolist() == [i // 64 for i in range(256)]
    assert (config["bits"], config["group_size"], config["sym"]) == (bits, 64, symmetric)
    assert (config["desc_act"], config["lm_head"]) == (False, True)


def test_only_symmetric_weights_take_gptqs_first_version(made, tmp_path):
    """Zero minus one would be 15: readers that add one with a carry would spoil the neighbour."""
    for symmetric, version in ((True, "gptq"), (False, "gptq_v2")):
        done = export(made(int4(4, symmetric))[1], tmp_path / version, format="gptq", progress=False)
        assert config_of(done.folder)["quantization_config"]["checkpoint_format"] == version
        assert any("gptq_v2" in note for note in done.notes) != symmetric


def test_names_that_vllm_joins_or_takes_apart_stand_beside_the_lists(tmp_path):
    plan = QuantizationPlan.from_dict(
        {"name": "p", "rules": [{"role": ["decoder", "vision"], "scheme": "int4", "symmetric": True}]}
    )
    folder = save_glm4v(tmp_path / "glm4v")
    made = save(load(folder, plan, "cpu", progress=False), tmp_path / "q", progress=False)
    config = config_of(export(made, progress=False).folder)["quantization_config"]
    [group] = config["config_groups"].values()
    assert {"model.visual.blocks.0.attn.qkv", "model.visual.blocks.0.attn.qkv_proj"} <= set(group["targets"])
    assert "model.visual.blocks.1.mlp.gate_up_proj" in group["targets"]
    done = export(made, format="gptq", dequantize=["vision"], progress=False)
    [names] = config_of(done.folder)["quantization_config"]["modules_in_block_to_quantize"]
    layer = "model.language_model.layers.0.mlp"
    assert {f"{layer}.gate_up_proj", f"{layer}.gate_proj", f"{layer}.up_proj"} <= set(names)


@pytest.mark.parametrize("unquantized", [False, True])
def test_gptq_splits_what_its_readers_split(tmp_path, unquantized):
    """GPTQModel takes a fused gate_up_proj apart before it loads the weights, quantized or not."""
    rules = [{"role": "decoder", "scheme": "int4", "symmetric": True}]
    if unquantized:
        rules.insert(0, {"match": "re:.*layers.0.mlp.gate_up_proj", "scheme": "bf16"})
    plan = QuantizationPlan.from_dict({"name": "p", "rules": rules})
    engine = load(save_glm4v(tmp_path / "glm4v"), plan, "cpu", progress=False)
    done = export(save(engine, tmp_path / "q", progress=False), format="gptq", progress=False)
    stored = tensors_of(done.folder)
    assert not any("gate_up_proj" in name for name in stored)
    layer = "model.language_model.layers.0.mlp"
    fused = engine.model.get_submodule(f"{layer}.gate_up_proj")
    dynamic = config_of(done.folder)["quantization_config"]["dynamic"]
    for part, name in zip(range(2), ("gate_proj", "up_proj")):
        rows = slice(part * fused.out_features // 2, (part + 1) * fused.out_features // 2)
        excluded = f"-:^{re.escape(f'{layer}.{name}')}$" in dynamic
        assert excluded == unquantized
        if unquantized:
            assert torch.equal(stored[f"{layer}.{name}.weight"], fused.weight[rows])
            continue
        codes = unpack_words(stored[f"{layer}.{name}.qweight"].T.contiguous(), 4, fused.in_features)
        assert torch.equal(codes, fused.codes[rows])
        assert torch.equal(stored[f"{layer}.{name}.scales"].T.float(), fused.scale[rows].float())


def test_gptq_refuses_linears_that_its_readers_do_not_look_for(tmp_path):
    plan = QuantizationPlan.from_dict(
        {"name": "p", "rules": [{"role": ["decoder", "vision"], "scheme": "int4", "symmetric": True}]}
    )
    engine = load(save_glm4v(tmp_path / "glm4v"), plan, "cpu", progress=False)
    made = save(engine, tmp_path / "q", progress=False)
    with pytest.raises(
        LabError, match="look for the decoder's Linears and lm_head alone; nearest: unquantized"
    ):
        export(made, format="gptq", progress=False)
    stored = tensors_of(export(made, format="gptq", dequantize=["auto"], progress=False).folder)
    assert "model.visual.blocks.0.attn.qkv.weight" in stored
    assert "model.language_model.layers.0.self_attn.q_proj.qweight" in stored


def test_scales_beyond_fp16_are_refused_with_all_else(made, tmp_path):
    """With the rest, before anything is written."""
    plan = QuantizationPlan.from_dict(
        {
            "name": "beyond",
            "rules": [
                {"match": "re:.*q_proj", "scheme": "nf4"},
                {"match": "re:.*", "scheme": "int4", "symmetric": True},
            ],
        }
    )
    folder = save_llama(tmp_path / "llama", vocab_size=320)
    engine = load(folder, plan, "cpu", progress=False)
    engine.model.get_submodule(LAYER).scale_zero[0, :, 0] = 1e-9
    quantized = save(engine, tmp_path / "q", progress=False)
    with pytest.raises(LabError, match=rf"nf4 of .*\. Nor int4 of {LAYER}: the format's scales are fp16"):
        export(quantized, tmp_path / "out", format="gptq", progress=False)
    assert not (tmp_path / "out").exists()
    assert export(quantized, tmp_path / "out", progress=False, dequantize=["auto"]).quantized == 15


def test_gptqs_exceptions_stand_in_dynamic(made, tmp_path):
    plan = QuantizationPlan.from_dict(
        {
            "name": "exceptions",
            "rules": [
                {"match": "lm_head", "scheme": "int8"},
                {"match": "re:.*layers.0.*", "scheme": "bf16"},
                {"match": "re:.*", "scheme": "int4", "symmetric": True},
            ],
        }
    )
    done = export(made(plan)[1], tmp_path / "out", format="gptq", progress=False)
    config = config_of(done.folder)["quantization_config"]
    assert config["dynamic"]["+:^lm_head$"] == {"bits": 8, "group_size": -1, "sym": True}
    assert config["dynamic"]["-:^model\\.layers\\.0\\.mlp\\.up_proj$"] == {}
    assert config["modules_in_block_to_quantize"][0][-1] == "lm_head"
    assert tensors_of(done.folder)["lm_head.qzeros"].shape == (1, 320 // 4)


@pytest.mark.parametrize(
    ("plan", "format", "told"),
    [
        ("nf4", "compressed-tensors", "nf4 of model.layers.0.self_attn.q_proj and 14 more: its weight is "
         "no integer times a scale; nearest: int4 with group_size 64"),
        ("llm-int8", "compressed-tensors", "nearest: int8-dynamic, or int8"),
        ("int3", "compressed-tensors", "the format's versions pack 3 bits differently; nearest: int4 with num_bits 4"),
        ("hqq-4bit", "gptq", "its zero points are real numbers; nearest: gptq, or int4"),
        ("awq", "compressed-tensors", "siblings such as q, k and v have others, so the norm before them cannot take "
         "it up; nearest: gptq, or int4"),
        ("nf4", "gptq", "nearest: int4 with group_size 64"),
        ("llm-int8", "gptq", "nearest: int8."),
        ("int8-dynamic", "gptq", "the format quantizes weights only; nearest: int8, or --format compressed-tensors"),
    ],
)  # fmt: skip
def test_what_the_format_cannot_express_is_refused_with_the_nearest(made, tmp_path, plan, format, told):
    _, folder = made(PLANS[plan])
    with pytest.raises(LabError) as caught:
        export(folder, tmp_path / "out", format=format, progress=False)
    assert told in str(caught.value)
    assert str(caught.value).startswith(f"{format} cannot express")
    assert list(tmp_path.iterdir()) == []


def test_all_refusals_come_at_once_and_parts_can_be_written_unquantized(made, tmp_path):
    plan = QuantizationPlan.from_dict(
        {
            "name": "refused",
            "rules": [
                {"match": "lm_head", "scheme": "nf4"},
                {"match": "re:.*q_proj", "scheme": "llm-int8"},
                {"match": "re:.*", "scheme": "int4", "symmetric": True},
            ],
        }
    )
    engine, folder = made(plan)
    with pytest.raises(LabError, match=r"llm-int8 of .* and 1 more.*\. Nor nf4 of lm_head"):
        export(folder, tmp_path / "out", progress=False)
    with pytest.raises(LabError, match=r"nothing quantized is called 'head'; parts .* are decoder, lm_head"):
        export(folder, tmp_path / "out", dequantize=["head"], progress=False)
    names = ["lm_head", *(f"model.layers.{i}.self_attn.q_proj" for i in (0, 1))]
    done = export(folder, tmp_path / "out", dequantize=names, progress=False)
    stored = tensors_of(done.folder)
    for name in names:
        assert torch.equal(
            stored[f"{name}.weight"], engine.model.get_submodule(name).dequantize(torch.bfloat16)
        )
    assert set(names) <= set(config_of(done.folder)["quantization_config"]["ignore"])
    assert done.notes[0] == "3 Linears are written unquantized in bf16."
    assert "vLLM joins model.layers.0.self_attn.q_proj and" in done.notes[1]
    with pytest.raises(LabError, match="nothing is quantized in this checkpoint"):
        export(folder, tmp_path / "more", dequantize=["lm_head", "decoder"], progress=False)


@pytest.mark.parametrize("format", ["compressed-tensors", "gptq"])
def test_auto_takes_the_nearest_that_the_format_can_express(made, tmp_path, format):
    plan = QuantizationPlan.from_dict(
        {
            "name": "nearest",
            "rules": [
                {"match": "lm_head", "scheme": "nf4"},
                {"match": "re:.*q_proj", "scheme": "llm-int8"},
                {"match": "re:.*k_proj", "scheme": "int4", "num_bits": 3},
                {"match": "re:.*v_proj", "scheme": "hqq"},
                {"match": "re:.*o_proj", "scheme": "int8-dynamic"},
                {"match": "re:.*gate_proj", "scheme": "awq"},
                {"match": "re:.*up_proj", "scheme": "int8-dynamic", "smoothing": "rms"},
                {"match": "re:.*", "scheme": "int4", "symmetric": True},
            ],
        }
    )
    engine, folder = made(plan)
    with pytest.raises(LabError, match=r"Take the nearest with --dequantize auto, .*lm_head") as caught:
        export(folder, tmp_path / "out", format=format, progress=False)
    refused = {"nf4", "llm-int8", "hqq", "awq", "int8-dynamic"} | ({"int4"} if format != "gptq" else set())
    assert all(f"{scheme} of " in str(caught.value) for scheme in refused)
    done = export(folder, tmp_path / "out", format=format, dequantize=["auto"], progress=False)
    assert done.quantized == 15
    notes = " ".join(done.notes)
    assert "nf4, which" in notes
    assert "W4A16, groups of 64, symmetric, rounded anew" in notes
    stored, name = tensors_of(done.folder), "model.layers.0.self_attn.o_proj"
    module = engine.model.get_submodule(name)
    if format == "gptq":  # weights only: the same integers, multiplied by unrounded inputs
        codes = unpack_words(stored[f"{name}.qweight"].T.contiguous(), 8, module.in_features)
        assert torch.equal(codes.int() - 128, module.weight_int8.int())
        assert "2 Linears in int8-dynamic, which gptq cannot express, are written as the nearest" in notes
        assert notes.count("W8A16, per channel, symmetric, the same integers") == 1
    else:
        assert torch.equal(stored[f"{name}.weight"], module.weight_int8)
        name = "model.layers.0.self_attn.k_proj"
        module = engine.model.get_submodule(name)
        codes = unpack_words(stored[f"{name}.weight_packed"], 4, module.in_features).float() - 8
        weight = codes * stored[f"{name}.weight_scale"].float().repeat_interleave(64, 1)
        assert sqnr_db(module.dequantize(torch.float32), weight) > 15


def test_a_module_that_does_more_than_multiply_is_refused(tmp_path):
    """Such as one that scales its inputs first."""
    from labkit.loading.export.integers import cannot_be_integers
    from labkit.quantization.int4 import Int4Linear

    class Scaled(Int4Linear):
        pass

    module = Scaled(64, 64, False)
    module.set_weight(torch.randn(64, 64))
    assert cannot_be_integers(module) is None
    module.register_buffer("input_scale", torch.ones(64))
    assert cannot_be_integers(module) == "it also holds input_scale"


def test_zero_points_that_are_real_numbers_are_refused(tmp_path):
    """As refinements of round-to-nearest choose them: no integer format holds these."""
    folder = save_llama(tmp_path / "llama", vocab_size=320)
    engine = load(folder, int4(symmetric=False), "cpu", progress=False)
    engine.model.get_submodule(LAYER).scale_zero[0, :, 1] *= 1.25
    with pytest.raises(LabError, match=rf"int4 of {LAYER}: its zero points are real numbers"):
        export(save(engine, tmp_path / "q", progress=False), progress=False)


@pytest.mark.parametrize("format", ["compressed-tensors", "gptq"])
def test_weights_solved_on_calibration_are_written_as_they_were_solved(made, tmp_path, format):
    engine, folder = made(PLANS["gptq"])
    stored = tensors_of(export(folder, tmp_path / "out", format=format, progress=False).folder)
    module = engine.model.get_submodule(LAYER)
    if format == "gptq":
        codes = unpack_words(stored[f"{LAYER}.qweight"].T.contiguous(), 4, module.in_features)
    else:
        codes = unpack_words(stored[f"{LAYER}.weight_packed"], 4, module.in_features)
    assert torch.equal(codes, module.codes)


def test_smoothed_inputs_and_stored_embeddings_are_refused_or_written_as_they_compute(tmp_path):
    folder = save_pocket(tmp_path / "pocket")
    engine = load(folder, PLANS["calibrated"], "cpu", calibration=2, progress=False)
    made = save(engine, tmp_path / "q", progress=False)
    with pytest.raises(LabError) as caught:
        export(made, format="compressed-tensors", progress=False)
    told = str(caught.value)
    assert "cannot take it up; nearest: int8-dynamic without smoothing" in told
    assert "the format quantizes Linears only; nearest: unquantized" in told
    plan = QuantizationPlan.from_dict(
        {
            "name": "stored",
            "rules": [
                {"role": "decoder", "scheme": "int4", "symmetric": True},
                {"role": "embedding", "modules": "embedding", "scheme": "int8"},
                {"role": "speech", "modules": "conv", "scheme": "int8"},
            ],
        }
    )
    engine = load(folder, plan, "cpu", progress=False)
    made = save(engine, tmp_path / "stored", progress=False)
    done = export(made, dequantize=["embedding", "speech"], progress=False)
    stored = tensors_of(done.folder)
    names = [name for name in engine.resolved.schemes if "embed_tokens" in name or "conv_layers" in name]
    assert len(names) > 1
    for name in names:
        assert torch.equal(stored[f"{name}.weight"], engine.model.get_submodule(name).weight)
        assert not any(key.startswith(f"{name}.weight_int8") for key in stored)


def test_a_tie_that_was_cut_is_cut_in_the_configuration(tmp_path):
    folder = save_llama(tmp_path / "llama", tie_word_embeddings=True, vocab_size=320)
    plan = QuantizationPlan.from_dict({"name": "head", "rules": [{"match": "lm_head", "scheme": "int8"}]})
    for number, (chosen, tied) in enumerate([(int4(), True), (plan, False)]):
        made = save(load(folder, chosen, "cpu", progress=False), tmp_path / str(number), progress=False)
        done = export(made, progress=False)
        assert config_of(done.folder)["tie_word_embeddings"] == tied
        stored = tensors_of(done.folder)
        assert "model.embed_tokens.weight" in stored
        assert ("lm_head.weight_packed" in stored) != tied
        assert "lm_head.weight" not in stored


def test_the_folder_can_be_published(tmp_path, capsys):
    folder = save_glm4v(tmp_path / "glm4v")
    plan = QuantizationPlan.from_dict({"name": "decoder", "rules": [{"role": "decoder", "scheme": "int8"}]})
    made = save(load(folder, plan, "cpu", progress=False), tmp_path / "q", progress=False)
    umask = os.umask(0o022)
    try:
        arguments = ["export", str(made), "--format", "compressed-tensors"]
        assert main(arguments) == 0
    finally:
        os.umask(umask)
    output = tmp_path / "q-compressed-tensors"
    assert f"{output}: 12 Linears quantized" in capsys.readouterr().out
    names = {path.name for path in output.iterdir()}
    assert {"config.json", "tokenizer.json", "preprocessor_config.json", "chat_template.jinja"} <= names
    assert {"README.md", "labkit-export.json", "model.safetensors"} <= names
    assert not {"plan.yaml", "labkit.json", "packed.safetensors"} & names
    assert {path.stat().st_mode & 0o777 for path in output.iterdir()} == {0o644}
    assert "12 Linears: W8A16, per channel, symmetric" in (output / "README.md").read_text()
    assert json.loads((output / "labkit-export.json").read_text())["plan"]["name"] == "decoder"
    assert config_of(output)["dtype"] == "bfloat16"
    assert main(arguments) == 2
    assert "is there already" in capsys.readouterr().err
    assert main([*arguments, "--force"]) == 0


def test_large_exports_are_written_in_shards_with_an_index(made, tmp_path):
    _, folder = made(int4())
    whole = tensors_of(export(folder, tmp_path / "one", progress=False).folder)
    done = export(folder, tmp_path / "many", shard_bytes=50_000, progress=False)
    files = sorted(path.name for path in done.folder.glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert len(files) > 3
    index = json.loads((done.folder / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    parts = tensors_of(done.folder)
    assert index["weight_map"].keys() == parts.keys() == whole.keys()
    assert all(torch.equal(parts[name], whole[name]) for name in whole)


def test_names_that_other_engines_may_not_know_are_told(tmp_path):
    model, processor = tiny_models.glm_asr()
    model.to(torch.bfloat16).save_pretrained(tmp_path / "asr")
    processor.save_pretrained(tmp_path / "asr")
    plan = QuantizationPlan.from_dict({"name": "p", "rules": [{"role": "decoder", "scheme": "int8"}]})
    made = save(load(tmp_path / "asr", plan, "cpu", progress=False), tmp_path / "q", progress=False)
    assert "as transformers 5 calls the modules of glmasr" in export(made, progress=False).notes[0]


def test_what_is_no_quantized_checkpoint_is_refused(llama, made, tmp_path):
    with pytest.raises(CheckpointError, match=r"has no labkit\.json: it is no quantized checkpoint"):
        export(llama, tmp_path / "out")
    with pytest.raises(LabError, match="unknown format 'mlx'; known are compressed-tensors, gptq, gguf"):
        export(llama, tmp_path / "out", format="mlx")
