"""A small Llama from a GGUF file, stored by the lab's schemes: the same weights as llama.cpp reads.

The 4-bit codes of the file are taken as they are, in groups of 32; their scales go from fp16 to bf16, as `int4` keeps
them, which moves a weight by 0.4 % of its step at most. Embedding and head, 8 bits in blocks of 32 in the file,
become `int8` with one scale a row.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, ReaderTensor, dequantize
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from labkit.common.errors import LabError
from labkit.engine.engine import Engine
from labkit.models.processors import TemplateProcessor
from labkit.models.spec import ModelSpec
from labkit.plans.plan import QuantizationPlan
from labkit.plans.quantize import quantize_
from labkit.quantization import DTYPES
from labkit.quantization.int4 import Int4Linear

PLANS = ("fp32", "bf16", "int8", "int4")
BLOCK = 32
"""Values that share one scale in the file."""
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
_PACKED_BYTES = BLOCK // 2


class GGUFError(LabError):
    """A file that is no GGUF, damaged, or of a type that is not read here."""


def load_small_model(path: str | Path, plan: str) -> Engine:
    """The engine of a Llama in a GGUF file, under one of `PLANS`.

    Raises:
        GGUFError: the file cannot be read, or holds another architecture.
        LabError: another plan.
    """
    if plan not in PLANS:
        raise GGUFError(f"unknown plan {plan!r} for the small model; known: {', '.join(PLANS)}")
    file = open_gguf(path)
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


def open_gguf(path: str | Path) -> GGUFReader:
    """The file, mapped into memory. Raises `GGUFError` if it is none, or damaged."""
    try:
        return GGUFReader(path)
    except FileNotFoundError:
        raise GGUFError(f"{path}: no such file") from None
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise GGUFError(f"{path}: no GGUF file, or a damaged one ({error})") from None


def fact(file: GGUFReader, key: str) -> Any:
    """The number, string or list under `key`; None if there is none."""
    field = file.get_field(key)
    return None if field is None else field.contents()


def tensor_values(file: GGUFReader, name: str) -> torch.Tensor:
    """fp32. Raises `GGUFError` for a tensor that is not there, or of a type that the library cannot dequantize."""
    tensor = _tensor(file, name)
    try:
        values = dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError:
        raise GGUFError(f"{_path(file)}: {name} is {tensor.tensor_type.name}, which is not read") from None
    return torch.from_numpy(np.array(values, dtype=np.float32))


def quantized(file: GGUFReader, name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """codes [N, K] uint8, scale and offset [N, K/32] fp32 of a tensor in Q4_0 or Q4_1: ``code * scale + offset``.

    A block is its fp16 scale, in Q4_1 its fp16 offset, and 16 bytes of codes: byte j holds value j in its low half,
    value j + 16 in its high half. Raises `GGUFError` for a tensor of another type.
    """
    tensor = _tensor(file, name)
    if tensor.tensor_type not in (GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q4_1):
        raise GGUFError(f"{_path(file)}: {name} is {tensor.tensor_type.name}, not one of 4 bits")
    columns, rows = tensor.shape.tolist()
    blocks = np.array(tensor.data).reshape(rows, columns // BLOCK, -1)
    packed = blocks[..., -_PACKED_BYTES:]
    codes = np.concatenate((packed & 15, packed >> 4), axis=-1).reshape(rows, columns)
    factors = blocks[..., :-_PACKED_BYTES].copy().view("<f2").astype(np.float32)
    scale = factors[..., 0]
    offset = factors[..., 1] if tensor.tensor_type == GGMLQuantizationType.Q4_1 else -8 * scale
    return torch.from_numpy(codes), torch.from_numpy(scale), torch.from_numpy(offset)


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


def _path(file: GGUFReader) -> Path:
    return Path(file.data.filename)


def _tensor(file: GGUFReader, name: str) -> ReaderTensor:
    for tensor in file.tensors:
        if tensor.name == name:
            return tensor
    raise GGUFError(f"{_path(file)}: there is no tensor {name}")


def _dense(file: GGUFReader) -> LlamaForCausalLM:
    config = _config(file)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    embedding = tensor_values(file, "token_embd.weight")
    weights = {
        "model.embed_tokens.weight": embedding,
        "model.norm.weight": tensor_values(file, "output_norm.weight"),
    }
    tied = all(tensor.name != "output.weight" for tensor in file.tensors)
    weights["lm_head.weight"] = embedding.clone() if tied else tensor_values(file, "output.weight")
    for number in range(config.num_hidden_layers):
        for ours, theirs in (_LINEARS | _NORMS).items():
            values = tensor_values(file, f"blk.{number}.{theirs}.weight")
            weights[f"model.layers.{number}.{ours}.weight"] = _turned(values, ours, config)
    model = LlamaForCausalLM(config)  # on the CPU, with its computed buffers
    model.load_state_dict(weights)
    return model


def _take_codes(module: Int4Linear, file: GGUFReader, name: str) -> None:
    """The file's own codes instead of rounded values."""
    _, _, number, ours = name.split(".", 3)
    config = _config(file)
    parts = quantized(file, f"blk.{number}.{_LINEARS[ours]}.weight")
    codes, scale, offset = (_turned(part, ours, config) for part in parts)
    module.set_codes_and_zero(codes, scale, offset + module.middle * scale)
    module.settle()


def _turned(values: torch.Tensor, name: str, config: LlamaConfig) -> torch.Tensor:
    """Rows of queries and keys from the file's order, rotated pairs side by side, to transformers', half a head apart."""
    heads = {"self_attn.q_proj": config.num_attention_heads, "self_attn.k_proj": config.num_key_value_heads}
    if name not in heads:
        return values
    pairs = values.view(heads[name], -1, 2, values.shape[1])
    return pairs.transpose(1, 2).reshape(values.shape)


def _config(file: GGUFReader) -> LlamaConfig:
    architecture = fact(file, "general.architecture")
    if architecture != "llama":
        raise GGUFError(f"{_path(file)}: a model of the architecture {architecture}; llama is read here")
    return LlamaConfig(
        vocab_size=len(file.fields["tokenizer.ggml.tokens"].data),
        hidden_size=fact(file, "llama.embedding_length"),
        intermediate_size=fact(file, "llama.feed_forward_length"),
        num_hidden_layers=fact(file, "llama.block_count"),
        num_attention_heads=fact(file, "llama.attention.head_count"),
        num_key_value_heads=fact(file, "llama.attention.head_count_kv"),
        max_position_embeddings=fact(file, "llama.context_length"),
        rms_norm_eps=fact(file, "llama.attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": fact(file, "llama.rope.freq_base")},
        bos_token_id=None,
        eos_token_id=fact(file, "tokenizer.ggml.eos_token_id"),
        tie_word_embeddings=False,
        attn_implementation="sdpa",
    )


def _tokenizer(file: GGUFReader) -> PreTrainedTokenizerFast:
    """Its byte-level BPE, digits one by one, as SmolLM2's."""
    tokens = fact(file, "tokenizer.ggml.tokens")
    merges = [tuple(pair.split(" ", 1)) for pair in fact(file, "tokenizer.ggml.merges")]
    made = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    made.decoder = decoders.ByteLevel()
    kinds = fact(file, "tokenizer.ggml.token_type")
    made.add_special_tokens(
        [AddedToken(token, special=True) for token, kind in zip(tokens, kinds) if kind == _CONTROL]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        eos_token=tokens[fact(file, "tokenizer.ggml.eos_token_id")],
        chat_template=fact(file, "tokenizer.chat_template"),
    )
