"""GGUF exports hold the lab's own values, block by block, in llama.cpp's names and order; the rest is refused by name."""

import json

import numpy as np
import pytest
import tiny_models
import torch
from checkpoint_models import calibration_for, save_glm4v, save_llama, save_pocket
from gguf import GGUFReader, dequantize
from transformers import Qwen2Config, Qwen2ForCausalLM

from labkit.common.errors import LabError
from labkit.loading.export import export
from labkit.loading.load import load
from labkit.loading.save import save
from labkit.plans.plan import QuantizationPlan

DOWN = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("models") / "llama", vocab_size=320)


@pytest.fixture(scope="module")
def glm4v(tmp_path_factory):
    return save_glm4v(tmp_path_factory.mktemp("models") / "glm4v")


def quantized(model, folder, *rules, default="bf16"):
    """The engine of a model under a plan, and its folder."""
    plan = QuantizationPlan.from_dict({"name": "p", "rules": list(rules), "default": default})
    engine = load(model, plan, "cpu", calibration=calibration_for("llama"), progress=False)
    return engine, save(engine, folder / "q", progress=False)


def rule(scheme, match="re:.*", **options):
    return {"match": match, "scheme": scheme, **options}


def read(path):
    """{tensor: its type, its values}, and {fact: value}."""
    file = GGUFReader(path)
    tensors = {}
    for tensor in file.tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        tensors[tensor.name] = tensor.tensor_type.name, torch.from_numpy(np.array(values))
    return tensors, {name: field.contents() for name, field in file.fields.items()}


def in_pairs(weight, head_dim):
    """Rows of halves in the order of pairs."""
    return weight.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def in_halves(weight, head_dim, rotary):
    """Rows of pairs in the order of halves, the first `rotary` of each head."""
    heads = weight.unflatten(0, (-1, head_dim))
    return torch.cat([heads[:, 0:rotary:2], heads[:, 1:rotary:2], heads[:, rotary:]], 1).flatten(0, 1)


@pytest.mark.parametrize(
    ("scheme", "kind"),
    [
        (rule("int4", group_size=32, symmetric=True), "Q4_0"),
        (rule("int4", group_size=128, symmetric=True), "Q4_0"),
        (rule("int4", group_size=64, symmetric=True, num_bits=2), "Q4_0"),
        (rule("int4", group_size=64, symmetric=True, num_bits=3), "Q4_0"),
        (rule("int4", group_size=64, symmetric=True, num_bits=8), "Q8_0"),
        (rule("int8"), "Q8_0"),
        (rule("gptq", group_size=32, symmetric=True), "Q4_0"),
    ],
    ids=["g32", "g128", "2-bit", "3-bit", "8-bit", "int8", "gptq"],
)
def test_symmetric_weights_are_the_labs_to_the_bit(llama, tmp_path, scheme, kind):
    engine, folder = quantized(llama, tmp_path, scheme)
    done = export(folder, format="gguf", progress=False)
    tensors, _ = read(done.folder / f"{done.folder.name}.gguf")
    assert done.quantized == 15
    weight = engine.model.get_submodule(DOWN).dequantize(torch.float32)
    assert tensors["blk.1.ffn_down.weight"][0] == kind
    assert torch.equal(tensors["blk.1.ffn_down.weight"][1], weight)
    query = engine.model.get_submodule("model.layers.0.self_attn.q_proj").dequantize(torch.float32)
    assert torch.equal(tensors["blk.0.attn_q.weight"][1], in_pairs(query, 32))
    assert torch.equal(tensors["output.weight"][1], engine.model.lm_head.dequantize(torch.float32))


def test_asymmetric_weights_differ_only_where_fp16_rounds_the_offset(llama, tmp_path):
    engine, folder = quantized(llama, tmp_path, rule("int4", group_size=32))
    done = export(folder, format="gguf", progress=False)
    kind, stored = read(done.folder / f"{done.folder.name}.gguf")[0]["blk.1.ffn_down.weight"]
    module = engine.model.get_submodule(DOWN)
    scale, zero = module.scale_zero.float().unbind(-1)
    offset = (zero - 8 * scale).T
    exact = offset == offset.to(torch.float16).float()
    assert kind == "Q4_1"
    differs = (stored - module.dequantize(torch.float32)).abs().unflatten(1, (-1, 32)).amax(-1)
    assert exact.float().mean() > 0.9
    assert not differs[exact].any()
    assert (differs <= 2.0**-11 * offset.abs() + 1e-9).all()
    assert any("groups have an offset that fp16 rounds" in note for note in done.notes)


def test_the_eye_has_a_file_of_its_own(glm4v, tmp_path):
    engine, folder = quantized(
        glm4v, tmp_path, rule("int8", "re:.*attn.qkv"), rule("int4", group_size=32, symmetric=True)
    )
    done = export(folder, tmp_path / "phone", format="gguf", progress=False)
    text, facts = read(done.folder / "phone.gguf")
    eye, eye_facts = read(done.folder / "mmproj-phone.gguf")
    model = engine.model
    assert facts["general.architecture"] == "glm4"
    assert facts["glm4.rope.dimension_sections"] == [2, 3, 3, 0]
    assert facts["glm4.rope.dimension_count"] == 16
    key = model.model.language_model.layers[1].self_attn.k_proj
    assert torch.equal(text["blk.1.attn_k.weight"][1], in_halves(key.dequantize(torch.float32), 32, 16))
    assert torch.equal(text["blk.1.attn_k.bias"][1], in_halves(key.bias.float(), 32, 16))
    fused = model.model.language_model.layers[0].mlp.gate_up_proj
    assert torch.equal(text["blk.0.ffn_up.weight"][1], fused.dequantize(torch.float32))
    assert eye_facts["general.architecture"] == "clip"
    assert eye_facts["clip.projector_type"] == "glm4v"
    assert eye_facts["clip.vision.image_max_pixels"] == 28 * 28 * 64
    assert eye["v.blk.0.attn_qkv.weight"][0] == "Q8_0"
    visual = model.model.visual
    patches = visual.patch_embed.proj.weight.float()
    assert torch.equal(eye["v.patch_embd.weight"][1], patches[:, :, 0])
    assert torch.equal(eye["v.patch_embd.weight.1"][1], patches[:, :, 1])
    assert eye["v.position_embd.weight"][0] == "F32"
    assert torch.equal(eye["mm.patch_merger.weight"][1], visual.downsample.weight.float())
    assert torch.equal(eye["mm.down.weight"][1], visual.merger.down_proj.dequantize(torch.float32))
    assert not set(text) & set(eye)


@pytest.mark.parametrize(("dtype", "kind"), [("bfloat16", "BF16"), ("float16", "F16"), ("float32", "F32")])
def test_an_unquantized_model_keeps_its_values(tmp_path, dtype, kind):
    folder = save_llama(tmp_path / "llama")
    model = tiny_models.llama().to(getattr(torch, dtype))
    model.save_pretrained(folder)
    done = export(folder, format="gguf", progress=False)
    tensors, facts = read(done.folder / f"{done.folder.name}.gguf")
    weight = model.get_submodule(DOWN).weight.float()
    assert tensors["blk.1.ffn_down.weight"][0] == kind
    assert torch.equal(tensors["blk.1.ffn_down.weight"][1], weight)
    assert tensors["output_norm.weight"][0] == "F32"
    assert facts["tokenizer.ggml.pre"] == "gpt-2"
    assert facts["tokenizer.ggml.tokens"][facts["tokenizer.ggml.eos_token_id"]] == "<|endoftext|>"
    assert done.quantized == 0


def test_an_embedding_of_8_bits_is_kept(llama, tmp_path):
    embedding = {"role": "embedding", "modules": "embedding", "scheme": "int8"}
    engine, folder = quantized(llama, tmp_path, embedding)
    done = export(folder, format="gguf", progress=False)
    kind, stored = read(done.folder / f"{done.folder.name}.gguf")[0]["token_embd.weight"]
    module = engine.model.model.embed_tokens
    assert kind == "Q8_0"
    assert torch.equal(stored, module.weight_int8 * module.scale.float()[:, None])


def test_a_tied_head_is_left_to_the_embedding(tmp_path):
    folder = save_llama(tmp_path / "llama", tie_word_embeddings=True)
    done = export(folder, format="gguf", progress=False)
    tensors, _ = read(done.folder / f"{done.folder.name}.gguf")
    assert "token_embd.weight" in tensors
    assert "output.weight" not in tensors


def test_a_fourth_token_that_ends_an_answer_is_named(tmp_path):
    folder = save_llama(tmp_path / "llama", vocab_size=320)
    ends = {"eos_token_id": [256, 257, 258, 259]}
    (folder / "generation_config.json").write_text(json.dumps(ends))
    done = export(folder, format="gguf", progress=False)
    _, facts = read(done.folder / f"{done.folder.name}.gguf")
    assert [facts[f"tokenizer.ggml.{name}_token_id"] for name in ("eos", "eot", "eom")] == [256, 257, 258]
    assert any("pass as `stop` besides: <|system|>" in note for note in done.notes)


def test_the_card_says_the_bits_that_are_written(llama, tmp_path):
    _, folder = quantized(llama, tmp_path, rule("int4", group_size=64, symmetric=True, num_bits=2))
    done = export(folder, tmp_path / "phone", format="gguf", progress=False)
    card = (done.folder / "README.md").read_text()
    assert "15 Q4_0 (4.5 bits)" in card
    assert "15 Linears have fewer than 4 bits, and take 4 here" in card
    assert "phone.gguf: " in card


@pytest.mark.parametrize(
    ("scheme", "reason"),
    [
        (
            rule("nf4"),
            "nf4 of .*and 14 more: its weight is no integer.*nearest: int4 with group_size 32 or 64",
        ),
        (rule("int4", group_size=16), "groups of 16 are no multiple of 32.*nearest: int4 with group_size 32"),
        (
            rule("int4", num_bits=8),
            "8-bit blocks have no zero point; nearest: int4 with num_bits 8 and symmetric",
        ),
        (rule("int8-dynamic"), "rounds inputs in blocks of its own.*nearest: int8"),
        (rule("hqq"), "zero points are real numbers; nearest: gptq, or int4"),
    ],
    ids=["nf4", "g16", "w8-asymmetric", "dynamic", "hqq"],
)
def test_what_no_block_holds_is_refused_with_the_nearest(llama, tmp_path, scheme, reason):
    _, folder = quantized(llama, tmp_path, scheme)
    with pytest.raises(LabError, match=reason):
        export(folder, format="gguf", progress=False)
    done = export(folder, format="gguf", dequantize=["auto"], progress=False)
    tensors, _ = read(done.folder / f"{done.folder.name}.gguf")
    assert tensors["blk.1.ffn_down.weight"][0] in ("Q4_0", "Q8_0", "BF16")


def test_rows_that_no_block_divides_are_named_and_written_unquantized_on_demand(tmp_path):
    folder = save_llama(tmp_path / "llama", intermediate_size=200)
    _, made = quantized(folder, tmp_path, rule("int8"))
    with pytest.raises(
        LabError, match=r"layers\.0\.mlp\.down_proj and 1 more: rows of 200 weights are no multiple"
    ):
        export(made, format="gguf", progress=False)
    done = export(made, format="gguf", dequantize=["auto"], progress=False)
    assert any("rows of 200" in note and "layers.1.mlp.down_proj" in note for note in done.notes)
    assert read(done.folder / f"{done.folder.name}.gguf")[0]["blk.1.ffn_down.weight"][0] == "BF16"


def test_positions_are_not_quantized(glm4v, tmp_path):
    _, folder = quantized(glm4v, tmp_path, {"role": "vision", "modules": "embedding", "scheme": "int8"})
    with pytest.raises(
        LabError, match=r"position_embedding: llama\.cpp resizes positions in fp32; nearest: unquantized"
    ):
        export(folder, format="gguf", progress=False)


def test_architectures_that_llama_cpp_does_not_read_are_refused_by_name(tmp_path):
    with pytest.raises(LabError, match=r"gguf cannot express the architecture pocket_phone.*glm4v"):
        export(save_pocket(tmp_path / "pocket"), format="gguf", progress=False)
    scaled = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
    folder = save_llama(tmp_path / "llama", rope_parameters=scaled, hidden_act="gelu")
    with pytest.raises(LabError, match="rope_type linear; nearest: default; hidden_act gelu; nearest: silu"):
        export(folder, format="gguf", progress=False)
    assert not (tmp_path / "llama-gguf").exists()


def test_sliding_windows_are_refused(tmp_path):
    config = Qwen2Config(
        vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, use_sliding_window=True, max_window_layers=0,
    )  # fmt: skip
    tiny_models.random_model(Qwen2ForCausalLM, config).save_pretrained(tmp_path / "qwen")
    tiny_models.tokenizer().save_pretrained(tmp_path / "qwen")
    with pytest.raises(LabError, match="sliding windows"):
        export(tmp_path / "qwen", format="gguf", progress=False)
