"""A model's decoder described for `labkit.quantization.native`: where each weight lies, and in which type."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from labkit.common.errors import LabError
from labkit.engine.step import decoder_modules, is_watched
from labkit.quantization.dense import DenseLinear
from labkit.quantization.int4 import Int4Linear
from labkit.quantization.int8 import Int8Linear
from labkit.quantization.int8_storage import StoredEmbedding
from labkit.quantization.kernels.cpu_int4 import block_of
from labkit.quantization.logits import DenseLogitsLinear, LogitsLinear, gives_logits
from labkit.quantization.native import library as native

TYPES = {torch.float32: native.F32, torch.bfloat16: native.BF16, torch.float16: native.F16}
MODELS = {
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Glm4vForConditionalGeneration",
}
INTERLEAVED = {
    "LlamaDecoderLayer": False,
    "MistralDecoderLayer": False,
    "Qwen2DecoderLayer": False,
    "Glm4vTextDecoderLayer": True,
}
"""Known decoder layers -> whether neighbours of a head are rotated together."""
ROTARY_TYPES = {"default", "linear", "llama3"}  # those whose frequencies do not depend on the length
DENSE = (nn.Linear, DenseLinear, LogitsLinear, DenseLogitsLinear)
UNIT = 64  # channels that fused Linears are split at: `UNIT` of linear.h


class Weights:
    """Addresses of weights for the library, which keep them from being freed.

    Args:
        dtype: of the decoder's hidden states.

    Attributes:
        embeddings: rows of the embedding; the head may have more or fewer.
    """

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype
        self.embeddings = 0
        self._kept: list[Tensor] = []

    def pointer(self, tensor: Tensor, *dtypes: torch.dtype) -> int:
        """The address of a weight that is of one of ``dtypes``.

        Raises:
            LabError: it is of another dtype, on another device, or not contiguous.
        """
        tensor = tensor.detach()
        if tensor.device.type != "cpu" or not tensor.is_contiguous():
            raise LabError("a weight is not on the CPU, or not in one piece")
        if tensor.dtype not in dtypes:  # the library would read beyond its end, or read other numbers
            raise LabError(f"a weight is in {tensor.dtype}, where {dtypes[0]} is expected")
        self._kept.append(tensor)
        return tensor.data_ptr()

    def floats(self, tensor: Tensor) -> int:
        """The address of the weight in fp32, a copy if it is of another dtype."""
        return self.pointer(tensor.detach().float().contiguous(), torch.float32)

    def linear(self, module: nn.Module, part: slice | None = None) -> native.Linear:
        """A Linear, or its channels ``part``.

        Raises:
            LabError: a Linear that the library does not know.
        """
        dtype = TYPES[self.dtype]
        part = part or slice(0, module.out_features)
        linear = native.Linear(
            out=part.stop - part.start, in_=module.in_features, taken=native.F32, given=dtype
        )
        if type(module) in DENSE and module.weight.dtype in TYPES:
            linear.type = TYPES[module.weight.dtype]
            if not isinstance(module, DenseLinear) and linear.type != dtype:
                raise LabError(f"a Linear is in {module.weight.dtype}")
            linear.taken, linear.given, linear.bias_first = linear.type, linear.type, 1
            linear.weight = self.pointer(module.weight[part], *TYPES)
        elif type(module) is Int8Linear:
            linear.type = native.INT8
            linear.weight = self.pointer(module.weight_int8[part], torch.int8)
            linear.scale = self.pointer(module.scale[part], torch.bfloat16)
        elif type(module) is Int4Linear and module.layout.startswith("blocks"):
            self._describe_int4(linear, module, part)
        else:
            kind = f"{type(module).__name__}, {getattr(module, 'layout', 'plain')} layout"
            raise LabError(f"a Linear is of a kind that is left to torch ({kind})")
        if module.bias is not None:
            linear.bias = self.floats(module.bias[part])
        return linear

    def _describe_int4(self, linear: native.Linear, module: Int4Linear, part: slice) -> None:
        if part.start % UNIT or (part.start and part.stop % UNIT):
            raise LabError(f"channels {part.start} to {part.stop} are no whole blocks")
        linear.type, linear.group, linear.block = native.INT4, module.group_size, block_of(module.layout)
        linear.stride = module.out_features
        linear.weight = self.pointer(module.packed[part], torch.uint8)  # blocks lie in the order of channels
        linear.scale = self.pointer(module.scale_zero, torch.bfloat16)
        linear.scale += 2 * torch.bfloat16.itemsize * part.start


def describe_decoder(model: nn.Module) -> tuple[native.Model, Weights]:
    """A model's decoder for the library, and what must live as long as it.

    Raises:
        LabError: a decoder, a Linear or a device that the library does not know; names it.
    """
    weights = Weights(_dtype_of(model))
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    first, attention = decoder.layers[0], decoder.layers[0].self_attn
    layers = (native.Layer * len(decoder.layers))()
    for number, (described, layer) in enumerate(zip(layers, decoder.layers)):
        if type(layer) is not type(first) or layer.self_attn.scaling != attention.scaling:
            raise LabError(f"decoder layer {number} is unlike the first")
        _describe_layer(described, layer, weights)
    described_model = native.Model(
        dtype=TYPES[weights.dtype],
        layers=len(layers),
        width=first.input_layernorm.weight.numel(),
        heads=layers[0].query.out // attention.head_dim,
        key_heads=layers[0].key.out // attention.head_dim,
        head_width=attention.head_dim,
        rotary=rotate(decoder, torch.zeros(1, 1, dtype=torch.int64, device="cpu"), weights.dtype)[0].shape[
            -1
        ],
        interleaved=INTERLEAVED[type(first).__name__],
        inner=layers[0].down.in_,
        vocabulary=head.out_features,
        epsilon=first.input_layernorm.variance_epsilon,
        scaling=attention.scaling,
        layer=layers,
        norm=weights.floats(decoder.norm.weight),
        head=weights.linear(head),
    )
    if gives_logits(head):
        described_model.head.given = native.F32
    _describe_embedding(described_model, model.get_input_embeddings(), weights)
    return described_model, weights


def rotate(decoder: Any, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The model's own cosines and sines ``[1, P, R]`` of ``positions [1, P]``, rounded to ``dtype``."""
    return decoder.rotary_emb(torch.empty(1, 1, dtype=dtype, device="cpu"), positions)


def _describe_layer(described: native.Layer, layer: Any, weights: Weights) -> None:
    attention, mlp = layer.self_attn, layer.mlp
    if hasattr(attention, "q_norm"):
        raise LabError("heads are normalised")
    described.before_attention = weights.floats(layer.input_layernorm.weight)
    if INTERLEAVED[type(layer).__name__]:
        described.after_attention = weights.floats(layer.post_self_attn_layernorm.weight)
        described.after_mlp = weights.floats(layer.post_mlp_layernorm.weight)
        inner = mlp.down_proj.in_features
        described.gate = weights.linear(mlp.gate_up_proj, slice(0, inner))
        described.up = weights.linear(mlp.gate_up_proj, slice(inner, 2 * inner))
    else:
        described.gate, described.up = weights.linear(mlp.gate_proj), weights.linear(mlp.up_proj)
    described.before_mlp = weights.floats(layer.post_attention_layernorm.weight)
    described.query, described.key, described.value, described.out = (
        weights.linear(getattr(attention, f"{name}_proj")) for name in "qkvo"
    )
    described.down = weights.linear(mlp.down_proj)


def _describe_embedding(described: native.Model, embedding: nn.Module, weights: Weights) -> None:
    if type(embedding) is nn.Embedding:
        table = embedding.weight
        described.embedding = weights.pointer(table, *TYPES)
        described.embedding_type = described.embedding_given = TYPES[table.dtype]
    elif isinstance(embedding, StoredEmbedding):
        table = embedding.weight_int8
        described.embedding = weights.pointer(table, torch.int8)
        described.embedding_type, described.embedding_given = native.INT8, TYPES[embedding.dtype]
        described.embedding_scale = weights.pointer(embedding.scale, torch.bfloat16)
    else:
        raise LabError(f"the embedding is a {type(embedding).__name__}")
    weights.embeddings = len(table)


def _dtype_of(model: nn.Module) -> torch.dtype:
    """The dtype of the hidden states, after checking that the decoder is a known one."""
    if not any(cls.__name__ in MODELS for cls in type(model).__mro__):
        raise LabError(f"{type(model).__name__} is left to torch")
    decoder = model.get_decoder()
    kind = type(decoder.layers[0]).__name__
    config = model.config.get_text_config(decoder=True)
    rotary = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if kind not in INTERLEAVED or config.hidden_act != "silu" or rotary not in ROTARY_TYPES:
        raise LabError(f"{kind} with {config.hidden_act} and {rotary} rotation is left to torch")
    if any(map(is_watched, decoder_modules(model))):
        raise LabError("a module of the decoder is watched")
    norms = [module.weight for name, module in decoder.named_modules() if name.endswith("norm")]
    dtypes = {norm.dtype for norm in norms}
    if len(dtypes) != 1 or not dtypes <= set(TYPES) or any(norm.device.type != "cpu" for norm in norms):
        raise LabError("the decoder is not on the CPU, or in several dtypes")
    return dtypes.pop()
