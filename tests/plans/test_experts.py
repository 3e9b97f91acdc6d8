"""Experts of a mixture and transposed layers: quantized like every Linear, and the same model before."""

import copy

import pytest
import tiny_models
import torch
import transformers
from torch import nn

import labkit
from labkit.common.errors import LabError
from labkit.models.experts import every_expert_runs, unfuse_, unfused_copy
from labkit.models.families import find_roles
from labkit.plans.calibrate import input_statistics, watch_inputs
from labkit.plans.plan import QuantizationPlan
from labkit.plans.quantize import quantize_, weights_bytes
from labkit.quantization import QuantizedLinear
from labkit.quantization.affine import sqnr_db

SIZES = {
    "vocab_size": 263,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "pad_token_id": 0,
    "eos_token_id": 0,
    "num_experts_per_tok": 2,
}
GPT2 = {"vocab_size": 263, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "eos_token_id": 0}
EXACT = {
    "mixtral": {**SIZES, "num_local_experts": 4},
    "qwen3_moe": {**SIZES, "num_experts": 4, "moe_intermediate_size": 64},
    "phimoe": {**SIZES, "num_local_experts": 4},
    "gpt2": GPT2,
}
CLOSE = {
    "gpt_oss": {**SIZES, "num_local_experts": 4}
}  # its products are transposed, and its bias is added to rounded sums


def mixture(name="mixtral", **facts):
    config = transformers.CONFIG_MAPPING[name](**{**(EXACT | CLOSE)[name], **facts})
    torch.manual_seed(0)
    model = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.15)
    if name != "gpt2":
        model.set_experts_implementation("eager")
    return model


def sequences(count=4, length=24, seed=1):
    return list(torch.randint(1, 200, (count, 1, length), generator=torch.Generator().manual_seed(seed)))


def logits(model, ids):
    with torch.inference_mode():
        return model(ids).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", [*EXACT, *CLOSE])
def test_a_model_with_linears_for_its_experts_gives_the_same_logits(name, dtype):
    model = mixture(name).to(dtype)
    expected = logits(model, sequences(1)[0])
    parameters = sum(parameter.numel() for parameter in model.parameters())
    names = unfuse_(model)
    assert len(names) == (8 if name == "gpt2" else 16)
    assert all(isinstance(model.get_submodule(own), nn.Linear) for own in names)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    got = logits(model, sequences(1)[0])
    if name in EXACT:
        assert torch.equal(got, expected)
    else:
        assert sqnr_db(expected, got) > {torch.float32: 100, torch.bfloat16: 35}[dtype]
    assert unfuse_(model) == []


def test_a_model_that_shares_its_configuration_with_a_separated_one_stays_as_it_is():
    model = mixture()
    other = type(model)(model.config).eval()
    before = logits(other, sequences(1)[0])
    unfuse_(model)
    assert torch.equal(logits(other, sequences(1)[0]), before)


@pytest.mark.parametrize("plan", ["int8", "int4", "nf4", "hqq", "bf16", "fp32"])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "gpt2"])
def test_a_plan_reaches_the_experts_and_holds_the_predicted_bytes(name, plan):
    model = mixture(name)
    expected = logits(model, sequences(1)[0])
    predicted = QuantizationPlan.preset(plan).resolve(model).predicted_bytes
    with torch.device("meta"):
        skeleton = type(model)(model.config)
    assert QuantizationPlan.preset(plan).resolve(skeleton).predicted_bytes == predicted
    resolved = quantize_(model, plan, progress=False)
    assert weights_bytes(model) == resolved.predicted_bytes == predicted
    if plan not in ("bf16", "fp32"):
        reached, total = resolved.reached_by_role["decoder"]
        assert reached > 0.98 * total
        assert sum(isinstance(module, QuantizedLinear) for module in model.modules()) == len(resolved.schemes)
    floor = {"int4": 3, "nf4": 3, "hqq": 3, "int8": 15, "bf16": 20, "fp32": 100}[plan]
    assert sqnr_db(expected, logits(model, sequences(1)[0]).float()) > floor


def test_resolving_a_plan_leaves_the_model_as_it_is():
    model = mixture()
    before = dict(model.state_dict(keep_vars=True))
    resolved = QuantizationPlan.preset("int4").resolve(model)
    assert "model.layers.1.mlp.experts.3.down_proj" in resolved.schemes
    assert any("8 experts are quantized as Linears of their own" in note for note in resolved.notes)
    after = model.state_dict(keep_vars=True)
    assert before.keys() == after.keys()
    assert all(before[name] is after[name] for name in before)
    bare, names = unfused_copy(model)
    assert {parameter.device.type for parameter in bare.parameters()} == {"meta"}
    assert len(names) == 16


def test_roles_that_a_caller_found_before_reach_the_experts_too():
    model = mixture()
    resolved = quantize_(model, "int8", roles=find_roles(model), progress=False)
    assert resolved.rules["model.layers.0.mlp.experts.2.gate_up_proj"] == 1


def test_calibration_reaches_experts_that_no_token_chooses():
    """Two tokens choose at most four of eight experts; the others calibrate on the same tokens."""
    model = mixture(num_local_experts=8)
    batches = sequences(1, length=2)
    names = [f"model.layers.0.mlp.experts.{number}.gate_up_proj" for number in range(8)]
    bare = copy.deepcopy(model)
    unfuse_(bare)
    seen = input_statistics(bare, names, batches)
    assert 2 <= len(seen) <= 4
    expected = logits(bare, batches[0])
    with every_expert_runs(bare):
        assert input_statistics(bare, names, batches).keys() == set(names)
        assert sqnr_db(expected, logits(bare, batches[0])) > 100  # the router's choice is the same
    quantize_(model, QuantizationPlan.uniform("gptq", group_size=32), batches, progress=False)
    assert all(isinstance(model.get_submodule(name), QuantizedLinear) for name in names)


def test_gptq_of_an_expert_is_nearer_than_rounding():
    model, batches, name = mixture(), sequences(), "model.layers.0.mlp.experts.0.gate_up_proj"
    rounded, solved = copy.deepcopy(model), copy.deepcopy(model)
    unfuse_(model)
    rows = []
    with every_expert_runs(model):
        watch_inputs(model, [name], batches, lambda name, number, inputs: rows.append(inputs))
    options = {"num_bits": 3, "group_size": 32}
    quantize_(solved, QuantizationPlan.uniform("gptq", **options), batches, progress=False)
    quantize_(rounded, QuantizationPlan.uniform("int4", **options), progress=False)
    inputs = torch.cat(rows)
    expected = model.get_submodule(name)(inputs)
    got = [other.get_submodule(name)(inputs.bfloat16()).float() for other in (solved, rounded)]
    assert sqnr_db(expected, got[0]) > sqnr_db(expected, got[1])


def test_a_mixture_is_quantized_saved_and_restored_bit_for_bit(tmp_path):
    mixture("qwen3_moe").save_pretrained(tmp_path / "model")
    tiny_models.tokenizer().save_pretrained(tmp_path / "model")
    engine = labkit.load(tmp_path / "model", plan="int4", device="cpu", progress=False)
    assert engine.resolved.predicted_bytes == weights_bytes(engine.model)
    restored = labkit.load(
        labkit.save(engine, tmp_path / "saved", progress=False), device="cpu", progress=False
    )
    prompt = {"input_ids": sequences(1)[0]}
    assert torch.equal(engine.forward.prefill(prompt)[1], restored.forward.prefill(prompt)[1])
    random = labkit.load(tmp_path / "model", plan="int4", device="cpu", weights="random", progress=False)
    assert weights_bytes(random.model) == engine.resolved.predicted_bytes
    assert random.forward.prefill(prompt)[1].isfinite().all()


def test_an_answer_of_a_mixture_is_the_same_alone_and_in_company(tmp_path):
    mixture().save_pretrained(tmp_path)
    tiny_models.tokenizer().save_pretrained(tmp_path)
    engine = labkit.load(tmp_path, plan="fp32", device="cpu", progress=False)
    assert engine.forward.way == "single"  # the rows of an expert are others in every company
    rows = [engine.forward.prefill({"input_ids": ids})[0] for ids in sequences(3)]
    alone = engine.forward.prefill({"input_ids": sequences(3)[0]})[0]
    together = engine.forward.step(rows, torch.tensor([5, 6, 7]))
    assert torch.equal(together[:1], engine.forward.step([alone], torch.tensor([5])))


def test_an_export_of_a_mixture_is_refused(tmp_path):
    mixture().save_pretrained(tmp_path / "model")
    tiny_models.tokenizer().save_pretrained(tmp_path / "model")
    engine = labkit.load(tmp_path / "model", plan="int8", device="cpu", progress=False)
    labkit.save(engine, tmp_path / "saved", progress=False)
    from labkit.loading.export.write import export

    with pytest.raises(LabError, match=r"experts.*no export writes these"):
        export(tmp_path / "saved", progress=False)


def test_a_plan_that_reaches_less_than_half_of_a_role_says_so_before_it_starts():
    config = transformers.Llama4TextConfig(
        **{**SIZES, "num_local_experts": 4}, intermediate_size_mlp=64, attn_scale=0.1
    )
    model = transformers.Llama4ForCausalLM(config).eval()
    with pytest.warns(
        UserWarning, match=r"decoder: the rules reach \d+% of its [\d,]+ values.*feed_forward.experts"
    ):
        resolved = QuantizationPlan.preset("int8").resolve(model)
    reached, total = resolved.reached_by_role["decoder"]
    assert 0 < reached < total / 2
    assert any("feed_forward.experts" in note for note in resolved.notes)


def test_a_plan_for_some_linears_of_a_role_needs_no_warning(recwarn):
    plan = QuantizationPlan.from_dict(
        {"name": "some", "rules": [{"role": "decoder", "linear": "q_proj", "scheme": "int8"}]}
    )
    resolved = plan.resolve(tiny_models.llama())
    reached, total = resolved.reached_by_role["decoder"]
    assert 0 < reached < total / 2
    assert not resolved.notes
    assert not recwarn.list
