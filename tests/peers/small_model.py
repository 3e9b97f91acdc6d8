"""A small Llama from a GGUF file, stored by the lab's schemes: the same weights as llama.cpp reads.

The 4-bit codes of the file are taken as they are, in groups of 32; their scales go from fp16 to bf16, as `int4` keeps
them, which moves a weight by 0.4 % of its step at most. Embedding and head, 8 bits in blocks of 32 in the file,
become `int8` with one scale a row.
"""

from __future__ import annotations

from pathlib import Path

import torch
from gguf_file import BLOCK, GGUF, GGUFError
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from labkit.engine.engine import Engine
from labkit.models.processors import TemplateProcessor
from labkit.models.spec import ModelSpec
from labkit.plans.plan import QuantizationPlan
from labkit.plans.quantize import quantize_
from labkit.quantization import DTYPES
from labkit.quantization.int4 import Int4Linear

PLANS = ("fp32", "bf16", "int8", "int4")
_LINEARS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
_CONTROL = 3  # type of a token that is no text


def load_small_model(path: str | Path, plan: str) -> Engine:
    """The engine of a Llama in a GGUF file, under one of `PLANS`.

    Raises:
        GGUFError: the file cannot be read, or holds another architecture.
        LabError: another plan.
    """
    if plan not in PLANS:
        raise GGUFError(f"unknown plan {plan!r} for the small model; known: {', '.join(PLANS)}")
    file = GGUF(path)
    dtype = DTYPES.get(plan, torch.bfloat16)
    model = _dense(file).to(dtype)
    if plan in ("int8", "int4"):
        quantize_(model, _plan(plan), progress=False)
    if plan == "int4":
        for name, module in model.named_modules():
            if isinstance(module, Int4Linear):
                _take_codes(module, file, name)
    spec = ModelSpec(Path(path).stem, str(path))
    return Engine(model.eval(), TemplateProcessor(_tokenizer(file)), spec=spec)


def weights_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, each counted once."""
    tensors = {one.data_ptr(): one for one in (*model.parameters(), *model.buffers())}
    return sum(one.nbytes for one in tensors.values())


def _plan(name: str) -> QuantizationPlan:
    layers = {"match": "re:.*layers.*", "scheme": name}
    if name == "int4":
        layers["group_size"] = BLOCK
    outside = [
        {"role": "lm_head", "scheme": "int8"},
        {"role": "embedding", "modules": "embedding", "scheme": "int8"},
    ]
    return QuantizationPlan.from_dict({"name": name, "rules": [*outside, layers], "default": "bf16"})


def _dense(file: GGUF) -> LlamaForCausalLM:
    config = _config(file)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    embedding = torch.from_numpy(file.tensor("token_embd.weight"))
    weights = {
        "model.embed_tokens.weight": embedding,
        "model.norm.weight": torch.from_numpy(file.tensor("output_norm.weight")),
    }
    tied = "output.weight" not in file.types
    weights["lm_head.weight"] = embedding.clone() if tied else torch.from_numpy(file.tensor("output.weight"))
    for number in range(config.num_hidden_layers):
        for ours, theirs in (_LINEARS | _NORMS).items():
            values = torch.from_numpy(file.tensor(f"blk.{number}.{theirs}.weight"))
            weights[f"model.layers.{number}.{ours}.weight"] = _turned(values, ours, config)
    model = LlamaForCausalLM(config)  # on the CPU, with its computed buffers
    model.load_state_dict(weights)
    return model


def _take_codes(module: Int4Linear, file: GGUF, name: str) -> None:
    """The file's own codes instead of rounded values."""
    _, _, number, ours = name.split(".", 3)
    config = _config(file)
    found = file.quantized(f"blk.{number}.{_LINEARS[ours]}.weight")
    codes, scale, offset = (
        _turned(torch.from_numpy(one), ours, config) for one in (found.codes, found.scale, found.offset)
    )
    module.set_codes_and_zero(codes, scale, offset + module.middle * scale)
    module.settle()


def _turned(values: torch.Tensor, name: str, config: LlamaConfig) -> torch.Tensor:
    """Rows of queries and keys from the file's order, rotated pairs side by side, to transformers', half a head apart."""
    heads = {"self_attn.q_proj": config.num_attention_heads, "self_attn.k_proj": config.num_key_value_heads}
    if name not in heads:
        return values
    pairs = values.view(heads[name], -1, 2, values.shape[1])
    return pairs.transpose(1, 2).reshape(values.shape)


def _config(file: GGUF) -> LlamaConfig:
    architecture = file.facts.get("general.architecture")
    if architecture != "llama":
        raise GGUFError(f"{file.path}: a model of the architecture {architecture}; llama is read here")
    facts = {key.removeprefix("llama."): value for key, value in file.facts.items()}
    return LlamaConfig(
        vocab_size=len(file.facts["tokenizer.ggml.tokens"]),
        hidden_size=facts["embedding_length"],
        intermediate_size=facts["feed_forward_length"],
        num_hidden_layers=facts["block_count"],
        num_attention_heads=facts["attention.head_count"],
        num_key_value_heads=facts["attention.head_count_kv"],
        max_position_embeddings=facts["context_length"],
        rms_norm_eps=facts["attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": facts["rope.freq_base"]},
        bos_token_id=None,
        eos_token_id=file.facts["tokenizer.ggml.eos_token_id"],
        tie_word_embeddings=False,
        attn_implementation="sdpa",
    )


def _tokenizer(file: GGUF) -> PreTrainedTokenizerFast:
    """Its byte-level BPE, digits one by one, as SmolLM2's."""
    facts = file.facts
    tokens = facts["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ", 1)) for pair in facts["tokenizer.ggml.merges"]]
    made = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    made.decoder = decoders.ByteLevel()
    kinds = facts["tokenizer.ggml.token_type"]
    made.add_special_tokens(
        [AddedToken(token, special=True) for token, kind in zip(tokens, kinds) if kind == _CONTROL]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        eos_token=tokens[facts["tokenizer.ggml.eos_token_id"]],
        chat_template=facts.get("tokenizer.chat_template"),
    )
