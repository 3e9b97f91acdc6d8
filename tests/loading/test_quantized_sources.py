"""Checkpoints that others quantized: read by their format's definition, or refused by name."""

import json

import pytest
import tiny_models
import torch
from checkpoint_models import HELLO, logits, save_llama
from safetensors.torch import load_file, save_file

import labkit
from labkit.common.errors import LabError
from labkit.loading.load import load
from labkit.models import get_spec
from labkit.models.checkpoint import Checkpoint
from labkit.models.source_formats import Layout, source_format, without_quantization
from labkit.models.stored import check_parts, dequantized
from labkit.models.weight_files import Header

PROJECTIONS = "_proj.weight"


def rewrite(folder, quantize, **config):
    """Replace each projection's weight by what ``quantize(weight)`` gives: suffix -> tensor, "" its new values.

    Returns the dense weights that the stored ones stand for, by ``"dense"`` of ``quantize``.
    """
    stored, dense = {}, {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if not name.endswith(PROJECTIONS):
            stored[name] = weight
            continue
        tensors = quantize(weight.float())
        dense[name] = tensors.pop("dense")
        stored |= {
            name + suffix
            if suffix.startswith("_") or not suffix
            else f"{name[: -len('weight')]}{suffix}": tensor
            for suffix, tensor in tensors.items()
        }
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    change_config(folder, **config)
    return dense


def change_config(folder, **facts):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))


def groups(num_bits=4, kind="int", strategy="group", **more):
    return {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": num_bits, "type": kind, "strategy": strategy, "symmetric": True, **more},
        }
    }


def compressed(form, **weights):
    return {
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": form,
            "config_groups": groups(**weights),
            "ignore": ["lm_head"],
        }
    }


def fp8(weight, block):
    """``{"", dense}`` and a scale for each block of a weight."""
    rows, columns = (-(-size // step) for size, step in zip(weight.shape, block))
    scale = torch.empty(rows, columns)
    values = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    dense = torch.empty(weight.shape)
    for row in range(rows):
        for column in range(columns):
            part = (
                slice(row * block[0], (row + 1) * block[0]),
                slice(column * block[1], (column + 1) * block[1]),
            )
            scale[row, column] = weight[part].abs().amax() / 448
            values[part] = (weight[part] / scale[row, column]).to(torch.float8_e4m3fn)
            dense[part] = values[part].float() * scale[row, column]
    return values, scale, dense


def fp8_block(block, suffix="_scale_inv"):
    def quantize(weight):
        values, scale, dense = fp8(weight, block)
        return {"": values, suffix: scale, "dense": dense, "input_scale": torch.ones(1)}

    return quantize


def fp8_rows(suffix, shape=(-1, 1)):
    def quantize(weight):
        scale = weight.abs().amax(1) / 448
        values = (weight / scale[:, None]).to(torch.float8_e4m3fn)
        return {"": values, suffix: scale.view(shape), "dense": values.float() * scale[:, None]}

    return quantize


def fp8_tensor(shape):
    def quantize(weight):
        values, scale, dense = fp8(weight, weight.shape)
        return {"": values, "_scale": scale.view(shape), "dense": dense}

    return quantize


def int8_rows(weight):
    scale = weight.abs().amax(1, keepdim=True) / 127
    values = (weight / scale).round().to(torch.int8)
    return {"": values, "_scale": scale, "dense": values.float() * scale}


def int8_asymmetric(weight):
    low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    scale = (high - low) / 255
    zero_point = (-128 - low / scale).round().to(torch.int8)
    values = (weight / scale + zero_point).round().clamp(-128, 127).to(torch.int8)
    return {
        "": values,
        "_scale": scale,
        "_zero_point": zero_point,
        "dense": (values.float() - zero_point.float()) * scale,
    }


BLOCKS = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 96]}}
FORMATS = {
    "fp8 in blocks that do not divide": (fp8_block((64, 96)), BLOCKS),
    "fp8 per tensor": (fp8_tensor(()), {"quantization_config": {"quant_method": "fp8"}}),
    "fbgemm": (fp8_rows("_scale"), {"quantization_config": {"quant_method": "fbgemm_fp8"}}),
    "modelopt": (
        fp8_tensor((1,)),
        {"quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8"}},
    ),
    "float per row": (
        fp8_rows("_scale"),
        compressed("float-quantized", num_bits=8, kind="float", strategy="channel"),
    ),
    "float per row, flat": (
        fp8_rows("_scale", (-1,)),
        compressed("float-quantized", num_bits=8, kind="float", strategy="channel"),
    ),
    "float in blocks": (
        fp8_block((64, 64), "_scale"),
        compressed("float-quantized", num_bits=8, kind="float", strategy="block", block_structure=[64, 64]),
    ),
    "int8": (int8_rows, compressed("int-quantized", num_bits=8, strategy="channel")),
    "naive int8": (int8_asymmetric, compressed("naive-quantized", num_bits=8, strategy="channel")),
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_quantized_source_answers_as_the_weights_that_it_stands_for(tmp_path, name):
    quantize, config = FORMATS[name]
    folder = save_llama(tmp_path / "source")
    dense = rewrite(folder, quantize, **config)
    plain = save_llama(tmp_path / "plain")
    weights = load_file(plain / "model.safetensors") | dense
    save_file(weights, plain / "model.safetensors", metadata={"format": "pt"})
    engine = load(folder, "fp32", "cpu", progress=False)
    assert len(dense) == 14
    for weight, values in dense.items():
        assert torch.equal(engine.model.get_parameter(weight), values), weight
    assert torch.equal(logits(engine, HELLO), logits(load(plain, "fp32", "cpu", progress=False), HELLO))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_packed_weights_are_those_that_compressed_tensors_unpacks(tmp_path, bits, symmetric):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    facts = groups(num_bits=bits, group_size=32) if bits != 8 else groups(num_bits=8, strategy="channel")
    facts["group_0"]["weights"]["symmetric"] = symmetric
    scheme = QuantizationScheme(**facts["group_0"])
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")

    def quantize(weight):
        parts = weight.unflatten(1, (-1, 32 if bits != 8 else weight.shape[1]))
        low, high = parts.amin(-1).clamp(max=0), parts.amax(-1).clamp(min=0)
        scale = (high - low) / (2**bits - 1)
        zero_point = (-(2 ** (bits - 1)) - low / scale).round().to(torch.int8)
        if symmetric:
            scale, zero_point = parts.abs().amax(-1) / (2 ** (bits - 1)), torch.zeros_like(zero_point)
        state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero_point}
        stored = compressor.compress(state, scheme)
        dense = compressor.decompress(stored, scheme)["weight"]
        return {key.removeprefix("weight"): tensor for key, tensor in stored.items()} | {"dense": dense}

    folder = save_llama(tmp_path / "source")
    config = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": facts}
    dense = rewrite(folder, quantize, quantization_config=config)
    model = load(folder, "fp32", "cpu", progress=False).model
    for weight, values in dense.items():
        assert torch.equal(model.get_parameter(weight), values), weight


def test_words_of_older_writers_hold_whole_integers():
    codes = torch.arange(128).view(2, 64) % 8
    shifts = torch.arange(10) * 3
    padded = torch.nn.functional.pad(codes, (0, 6)).view(2, 7, 10)
    words = (padded << shifts).sum(-1).to(torch.int32)
    read = dequantized({"": words, "scale": torch.ones(1)}, (2, 64), Layout(3))
    assert torch.equal(read, (codes - 4).float())


def test_an_order_of_activations_gives_each_input_its_groups_scale():
    codes, scale = torch.ones(2, 6, dtype=torch.int8), torch.tensor([[1.0, 10.0], [2.0, 20.0]])
    order = torch.tensor([0, 1, 1, 0, 1, 0], dtype=torch.int32)
    parts = {"": codes, "scale": scale, "g_idx": order}
    assert dequantized(parts, (2, 6), Layout(8, (1, 3))).tolist() == [
        [1, 10, 10, 1, 10, 1],
        [2, 20, 20, 2, 20, 2],
    ]
    unset = {**parts, "g_idx": torch.full((6,), -1)}
    assert dequantized(unset, (2, 6), Layout(8, (1, 3)))[0].tolist() == [1, 1, 1, 10, 10, 10]


@pytest.mark.parametrize("plan", ["int4", "int8-dynamic"])
def test_an_export_of_the_lab_is_read_as_the_model_that_it_was_made_of(tmp_path, plan):
    folder = save_llama(tmp_path / "source")
    made = labkit.quantize_to(folder, plan, tmp_path / "made", "cpu", dtype="fp32", progress=False)
    exported = labkit.export(made.folder, tmp_path / "exported", progress=False)
    model = load(exported.folder, "fp32", "cpu", progress=False).model
    for name in made.engine.resolved.schemes:
        weight = made.engine.model.get_submodule(name).dequantize(torch.float32)
        torch.testing.assert_close(model.get_submodule(name).weight, weight, rtol=0, atol=2e-2)


def test_groups_of_several_widths_are_told_apart_by_their_targets(tmp_path):
    folder = save_llama(tmp_path)
    plan = {
        "name": "two",
        "rules": [
            {"role": "decoder", "linear": "down_proj", "scheme": "int8"},
            {"role": "decoder", "scheme": "int4"},
        ],
        "default": "fp32",
    }
    made = labkit.quantize_to(
        folder, labkit.QuantizationPlan.from_dict(plan), tmp_path / "made", "cpu", progress=False
    )
    exported = labkit.export(made.folder, tmp_path / "exported", progress=False)
    model = load(exported.folder, "fp32", "cpu", progress=False).model
    for name in made.engine.resolved.schemes:
        weight = made.engine.model.get_submodule(name).dequantize(torch.float32)
        assert (model.get_submodule(name).weight - weight).abs().max() < 2e-2, name


def test_a_quantized_source_can_be_quantized_again_and_its_folder_stands_alone(tmp_path, caplog):
    folder = save_llama(tmp_path / "source")
    rewrite(folder, *FORMATS["int8"][:1], **FORMATS["int8"][1])
    (folder / "hf_quant_config.json").write_text("{}")
    made = labkit.quantize_to(folder, "int4", tmp_path / "made", "cpu", progress=False)
    assert [record.getMessage().count("is quantized already") for record in caplog.records] == [1]
    assert not (made.folder / "hf_quant_config.json").exists()
    again = load(made.folder, device="cpu", progress=False)
    assert torch.equal(logits(again, HELLO), logits(made.engine, HELLO))


def test_transformers_own_loading_reads_dequantized_weights_too(tmp_path, monkeypatch):
    folder = save_llama(tmp_path / "source")
    dense = rewrite(folder, *FORMATS["int8"][:1], **FORMATS["int8"][1])
    model = Checkpoint(get_spec(folder)).weights(torch.device("cpu"), progress=False)
    for weight, values in dense.items():
        assert torch.equal(model.get_parameter(weight), values.to(torch.bfloat16))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"quant_method": "gptq", "bits": 4},
            "quantized by gptq, which the lab does not read .*FP8.*unquantized",
        ),
        ({"quant_method": "awq"}, "by awq"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "by bitsandbytes"),
        ({"quant_method": "mxfp4"}, "by mxfp4"),
        ({"quant_method": "torchao"}, "by torchao"),
        ({"quant_method": ["fp8"]}, r"by \['fp8'\]"),
        ({"load_in_4bit": True}, "does not name"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "by ModelOpt, NVFP4"),
        ({"quant_method": "labkit"}, "without its labkit.json"),
        ("fp8", "is not valid: 'str' object has no attribute"),
        ({"quant_method": "fp8", "weight_block_size": 128}, "weight_block_size is 128"),
        ({"quant_method": "compressed-tensors"}, "no valid config_groups"),
        ({"quant_method": "compressed-tensors", "config_groups": []}, "no valid config_groups"),
        (
            {"quant_method": "compressed-tensors", "config_groups": groups(), "format": "marlin-24"},
            "compressed-tensors, marlin-24",
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": groups(group_size="x"),
                "format": "pack-quantized",
            },
            "no valid config_groups",
        ),
        (
            compressed("pack-quantized", group_size=32)["quantization_config"]
            | {"sparsity_config": {"format": "sparse-24-bitmask"}},
            "sparse-24-bitmask",
        ),
        (
            compressed("pack-quantized", group_size=32)["quantization_config"]
            | {"transform_config": {"config_groups": {"u": {}}}},
            "transforms",
        ),
    ],
)
def test_a_format_that_is_not_read_is_refused_by_name_before_anything_else(
    tmp_path, config, message, monkeypatch
):
    monkeypatch.setattr(Checkpoint, "tensors", lambda *_: pytest.fail("the weights were read"))
    folder = save_llama(tmp_path)
    change_config(folder, quantization_config=config)
    with pytest.raises(LabError, match=message) as caught:
        load(folder, "fp32", "cpu", progress=False)
    assert "\n" not in str(caught.value)


def test_the_format_of_a_part_is_the_models():
    part = {"text_config": {"quantization_config": {"quant_method": "fp8"}}, "vision_config": {}}
    assert source_format(part, None, "x").name == "FP8"
    assert without_quantization(part) == {"text_config": {}, "vision_config": {}}
    assert source_format({"quantization_config": None}, None, "x") is None
    with pytest.raises(LabError, match="quantization_config must be an object"):
        source_format({"quantization_config": "fp8"}, None, "x")


def test_a_format_described_beside_config_json_is_refused(tmp_path):
    (save_llama(tmp_path) / "quantize_config.json").write_text('{"bits": 4}')
    with pytest.raises(LabError, match=r"what its quantize_config\.json describes"):
        load(tmp_path, "fp32", "cpu", progress=False)


@pytest.mark.parametrize(
    "suffix", ["_scale", "_scale_inv", "input_scale", "qzeros", "SCB", ".absmax", "bias", "lora_A.weight"]
)
def test_a_tensor_that_belongs_to_a_used_weight_is_never_left_out(tmp_path, suffix):
    folder = save_llama(tmp_path)
    weights = load_file(folder / "model.safetensors")
    weight = "model.layers.1.mlp.up_proj.weight"
    name = weight + suffix if suffix.startswith(("_", ".")) else weight.replace("weight", suffix)
    save_file(weights | {name: torch.ones(1)}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LabError, match=rf"hold {name}, which belongs to .*up_proj\.weight"):
        load(folder, "fp32", "cpu", progress=False)


def test_other_unused_tensors_are_one_line_with_a_count(tmp_path, caplog):
    folder = save_llama(tmp_path)
    weights = load_file(folder / "model.safetensors")
    for layer in range(180):
        weights[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        weights[f"draft.layers.{layer}.weight"] = torch.ones(4)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    load(folder, "fp32", "cpu", progress=False)
    assert [record.getMessage() for record in caplog.records] == [
        f"{folder.name}: 360 tensors were not used, such as draft.layers.0.weight"
    ]


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.uint8])
def test_integers_without_a_format_are_no_weights(tmp_path, dtype):
    folder = save_llama(tmp_path)
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    weights[name] = (weights[name] * 50).to(dtype)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LabError, match=f"{name} holds integers .* does not say how they are quantized"):
        load(folder, "fp32", "cpu", progress=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"scale": lambda scale: scale[:7]},
            r"scales or zero points are \[7, 1\].* the weight is \[128, 128\]",
        ),
        ({"": lambda values: values.to(torch.bfloat16)}, "stored in BF16 and has scales beside it"),
        ({"": lambda values: values[:, :64]}, r"is \(128, 64\), and its configuration says"),
    ],
)
def test_parts_that_do_not_fit_each_other_are_named(tmp_path, change, message):
    folder = save_llama(tmp_path)
    rewrite(folder, int8_rows, **FORMATS["int8"][1])
    weights = load_file(folder / "model.safetensors")
    weight = "model.layers.0.self_attn.q_proj.weight"
    for part, damage in change.items():
        name = f"{weight}_{part}" if part else weight
        weights[name] = damage(weights[name]).contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LabError, match=message):
        load(folder, "fp32", "cpu", progress=False)


PARTS = {
    "packed": ("I32", (128, 16)),
    "scale": ("F32", (128, 4)),
    "zero_point": ("I32", (16, 4)),
    "g_idx": ("I32", (128,)),
    "shape": ("I64", (2,)),
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"zero_point": None}, "it has no zero points, and is not symmetric"),
        ({"g_idx": None}, "it has no g_idx"),
        ({"g_idx": ("BF16", (128,))}, "its g_idx is .* BF16"),
        ({"g_idx": ("I32", (64,))}, r"its g_idx is \[64\]"),
        ({"zero_point": ("I32", (16, 3))}, "its zero points are"),
        ({"zero_point": ("U8", (128, 4))}, "its zero points are"),
        ({"zero_point": ("I32", (4,))}, "its zero points are"),
        ({"zero_point": ("I32", (8, 4))}, "8 words do not hold 128 integers of 4 bits"),
        ({"scale": ("I8", (128, 4))}, "its scales are I8"),
        ({"scale": ("F32", (1, 4))}, "1 x 32 weights each"),
        ({"scale": ("F32", (128, 8))}, "1 x 32 weights each"),
        ({"packed": ("I32", (128, 8))}, "8 words do not hold 128"),
        ({"packed": ("I32", (64, 16))}, r"its words are \[64, 16\]"),
        ({"packed": ("I64", (128, 16))}, "stored in I64"),
        ({"shape": None}, "packed at 4 bits with the shape"),
    ],
)
def test_parts_of_a_packed_weight_that_contradict_each_other_are_named(change, message):
    headers = {part: Header("file", shape, dtype) for part, (dtype, shape) in PARTS.items()}
    headers[""] = headers.pop("packed")
    layout = Layout(4, (1, 32), zero_points=True, ordered=True)
    check_parts(headers, (128, 128), layout)
    for part, values in change.items():
        key = "" if part == "packed" else part
        headers.pop(key)
        if values is not None:
            headers[key] = Header("file", values[1], values[0])
    with pytest.raises(ValueError, match=message):
        check_parts(headers, (128, 128), layout)


def test_an_order_that_names_no_group_is_refused():
    parts = {
        "": torch.ones(2, 4, dtype=torch.int8),
        "scale": torch.ones(2, 2),
        "g_idx": torch.tensor([0, 1, 2, 0]),
    }
    with pytest.raises(LabError, match="names the group 2 of 2"):
        dequantized(parts, (2, 4), Layout(8, (1, 2)))


def test_a_quantized_weight_without_its_scale_is_named(tmp_path):
    folder = save_llama(tmp_path)
    rewrite(folder, fp8_tensor(()), quantization_config={"quant_method": "fp8"})
    weights = load_file(folder / "model.safetensors")
    weight = "model.layers.0.self_attn.q_proj.weight"
    del weights[f"{weight}_scale"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LabError, match=f"{weight} is stored in F8_E4M3 and has no scale beside it"):
        load(folder, "fp32", "cpu", progress=False)


def test_a_quantized_source_with_random_weights_is_its_architecture(tmp_path):
    folder = save_llama(tmp_path)
    change_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    assert load(folder, "int8", "cpu", weights="random", progress=False).weights == "random"


def test_a_tiny_model_has_the_projections_that_these_tests_count():
    names = [name for name, _ in tiny_models.llama().named_parameters() if name.endswith(PROJECTIONS)]
    assert len(names) == 14


def test_experts_that_are_stored_in_fp8_one_by_one_are_joined_dequantized(tmp_path):
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        **{
            name: getattr(tiny_models.llama_config(), name)
            for name in ("vocab_size", "hidden_size", "eos_token_id")
        },
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=96,
        max_position_embeddings=256,
    )
    model = tiny_models.random_model(Qwen3MoeForCausalLM, config)
    folders = [tmp_path / "source", tmp_path / "plain"]
    for folder in folders:
        model.save_pretrained(folder)
        tiny_models.tokenizer().save_pretrained(folder)
    dense = rewrite(folders[0], fp8_block((64, 96)), **BLOCKS)
    save_file(
        load_file(folders[1] / "model.safetensors") | dense,
        folders[1] / "model.safetensors",
        metadata={"format": "pt"},
    )
    assert sum(".experts." in name for name in dense) == 12
    read, expected = (logits(load(folder, "fp32", "cpu", progress=False), HELLO) for folder in folders)
    assert torch.equal(read, expected)
    weights = load_file(folders[0] / "model.safetensors")
    change_config(folders[0], quantization_config=None)
    with pytest.raises(LabError, match=r"which belongs to .*proj\.weight"):
        load(folders[0], "fp32", "cpu", progress=False)
    assert any(name.endswith("experts.0.up_proj.weight_scale_inv") for name in weights)
