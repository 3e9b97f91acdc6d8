"""One decoding step on the CPU without torch's calls in between: a decoder described for `labkit.quantization.native`.

A step through a model's modules is hundreds of small calls, most of whose time passes between the products. Here
the decoder is described once - where each weight lies, in which type, how heads are rotated - and the compiled
library computes the whole step from the same memory: packed weights as the schemes keep them, keys and values in
the same `RowCache`. A row may go on either way after any token.

Values are rounded where torch would have stored them, so both ways give the same answers up to the order of sums;
and a row's sums do not depend on the rows beside it.

What can be described: Llama, Qwen2, Mistral and Glm4v decoders with SiLU, whose Linears are dense, int8, or int4
in blocks (int4, gptq, hqq). Anything else, hooks included, stays with torch.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from labkit.common.errors import LabError
from labkit.engine.row_cache import RowCache, RowLayer
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
"""Decoder layers that are known -> whether neighbours of a head are rotated together."""
ROTARY_TYPES = {"default", "linear", "llama3"}  # those whose frequencies do not depend on the length
DENSE = (nn.Linear, DenseLinear, LogitsLinear, DenseLogitsLinear)
UNIT = 64  # channels that fused Linears are split at: `UNIT` of linear.h
TABLE_GROWTH = 512  # positions


@dataclass
class RowState:
    """What the library knows of one conversation: pointers to its keys and values, which change as they grow, and the
    ``steps`` that it went by the library since `Row.positions` was counted."""

    keys: ctypes.Array
    values: ctypes.Array
    buffers: Any
    room: int
    steps: int = 0


class NativeStep:
    """A decoder on the CPU, described for the compiled library.

    Args:
        model: as `labkit.engine.forward.Forward` takes it.

    Raises:
        LabError: the decoder, a Linear or a device that the library does not know; says which.
        NativeError: there is no library.
    """

    def __init__(self, model: nn.Module):
        self._model = model
        self._kept: list[Tensor] = []  # what pointers point to
        self._lock = threading.Lock()
        self._cosine = self._sine = torch.empty(0)
        self.dtype = _dtype_of(model)
        self._decoder = model.get_decoder()
        self._rotary = self._decoder.rotary_emb
        self._described = self._describe()
        self._signature = signature(model)
        self._library = native.library()

    def is_current(self) -> bool:
        """Whether the description still holds: no Linear was replaced, moved or hooked since."""
        return self._signature == signature(self._model)

    def takes(self, row: Any) -> bool:
        """Whether it can go on with a row: no mask, a plain cache of the model's dtype, one position for all axes."""
        if row.mask is not None or row.positions is None or type(row.cache) is not RowCache:
            return False
        if row.native is None:
            if not row.cache.is_plain or any(
                layer.buffers is None or layer.buffers[0].dtype != self.dtype for layer in row.cache.layers
            ):
                return False
            axes = row.positions.flatten()[-3:]
            row.native = RowState(_pointers(row.cache, 0), _pointers(row.cache, 1), None, 0)
            row.place = int(axes[0]) if bool((axes == axes[0]).all()) else None
        return row.place is not None

    def step(self, rows: Sequence[Any], tokens: Tensor) -> Tensor:
        """Append one token to each row, ``tokens [B]`` int64; logits ``[B, vocabulary]`` fp32."""
        with self._lock:
            described = (native.Row * len(rows))()
            for one, row, token in zip(described, rows, tokens.tolist()):
                self._append(one, row, token)
            logits = torch.empty(len(rows), self._described.vocabulary)
            self._library.step(
                self._described, described, len(rows), logits.data_ptr(), torch.get_num_threads()
            )
        return logits

    def likeliest(self, logits: Tensor) -> tuple[list[float], Tensor]:
        """As `labkit.engine.forward.Forward.likeliest`, of fp32 logits on the CPU."""
        logits = logits.contiguous()
        count, vocabulary = logits.shape
        largest, tokens = (ctypes.c_float * count)(), torch.empty(count, dtype=torch.int64)
        self._library.largest(logits.data_ptr(), count, vocabulary, largest, tokens.data_ptr())
        return list(largest), tokens

    def _append(self, one: native.Row, row: Any, token: int) -> None:
        layers, state = row.cache.layers, row.native
        length = layers[0].length
        if layers[0].buffers is not state.buffers or length == state.room:
            for layer in layers:
                layer.reserve()
            state.keys, state.values = _pointers(row.cache, 0), _pointers(row.cache, 1)
            state.buffers, state.room = layers[0].buffers, layers[0].buffers[0].shape[-2]
        state.steps += 1
        row.place += 1
        if row.place >= len(self._cosine):
            self._extend_table(row.place)
        at = row.place * self._described.rotary * 4
        one.cosine, one.sine = self._cosine.data_ptr() + at, self._sine.data_ptr() + at
        one.keys, one.values = ctypes.addressof(state.keys), ctypes.addressof(state.values)
        one.length, one.room, one.token = length, state.room, token
        for layer in layers:
            layer.length = length + 1

    def _extend_table(self, place: int) -> None:
        """The model's own cosines and sines of positions up to ``place`` and some more, as floats [P, R]."""
        positions = torch.arange((place // TABLE_GROWTH + 1) * TABLE_GROWTH)[None]
        cosine, sine = self._rotary(torch.empty(1, 1, dtype=self.dtype), positions)
        self._cosine, self._sine = (part[0].float().contiguous() for part in (cosine, sine))

    # -- the description -----------------------------------------------------------------------------------------

    def _describe(self) -> native.Model:
        decoder, head = self._decoder, self._model.get_output_embeddings()
        layers = list(decoder.layers)
        first, attention = layers[0], layers[0].self_attn
        described = (native.Layer * len(layers))()
        for number, (one, layer) in enumerate(zip(described, layers)):
            if type(layer) is not type(first) or layer.self_attn.scaling != attention.scaling:
                raise LabError(f"decoder layer {number} is unlike the first")
            self._describe_layer(one, layer)
        width, head_width = first.input_layernorm.weight.numel(), attention.head_dim
        self._layers = described
        model = native.Model(
            dtype=TYPES[self.dtype],
            layers=len(layers),
            width=width,
            heads=described[0].query.out // head_width,
            key_heads=described[0].key.out // head_width,
            head_width=head_width,
            rotary=self._rotary(torch.empty(1, 1), torch.zeros(1, 1, dtype=torch.long))[0].shape[-1],
            interleaved=_is_interleaved(decoder),
            inner=described[0].down.in_,
            vocabulary=head.out_features,
            epsilon=first.input_layernorm.variance_epsilon,
            scaling=attention.scaling,
            layer=described,
            norm=self._floats(decoder.norm.weight),
            head=self._linear(head),
        )
        if gives_logits(head):
            model.head.given = native.F32
        self._describe_embedding(model, self._model.get_input_embeddings())
        return model

    def _describe_layer(self, one: native.Layer, layer: nn.Module) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        if hasattr(attention, "q_norm"):
            raise LabError("heads are normalised")
        one.before_attention = self._floats(layer.input_layernorm.weight)
        if _is_interleaved(self._decoder):
            one.after_attention = self._floats(layer.post_self_attn_layernorm.weight)
            one.after_mlp = self._floats(layer.post_mlp_layernorm.weight)
            inner = mlp.down_proj.in_features
            one.gate = self._linear(mlp.gate_up_proj, slice(0, inner))
            one.up = self._linear(mlp.gate_up_proj, slice(inner, 2 * inner))
        else:
            one.gate, one.up = self._linear(mlp.gate_proj), self._linear(mlp.up_proj)
        one.before_mlp = self._floats(layer.post_attention_layernorm.weight)
        one.query, one.key, one.value, one.out = (
            self._linear(getattr(attention, f"{name}_proj")) for name in "qkvo"
        )
        one.down = self._linear(mlp.down_proj)

    def _describe_embedding(self, model: native.Model, embedding: nn.Module) -> None:
        if type(embedding) is nn.Embedding:
            weight = embedding.weight
            model.embedding_type = model.embedding_given = TYPES.get(weight.dtype, -1)
        elif isinstance(embedding, StoredEmbedding):
            weight = embedding.weight_int8
            model.embedding_type, model.embedding_given = native.INT8, TYPES[embedding.dtype]
            model.embedding_scale = self._pointer(embedding.scale)
        else:
            raise LabError(f"the embedding is a {type(embedding).__name__}")
        model.embedding = self._pointer(weight)

    def _linear(self, module: nn.Module, part: slice | None = None) -> native.Linear:
        """One Linear, or the channels ``part`` of one."""
        dtype = TYPES[self.dtype]
        part = part or slice(0, module.out_features)
        one = native.Linear(out=part.stop - part.start, in_=module.in_features, taken=native.F32, given=dtype)
        if type(module) in DENSE and module.weight.dtype in TYPES:
            one.type = TYPES[module.weight.dtype]
            if not isinstance(module, DenseLinear) and one.type != dtype:
                raise LabError(f"a Linear is in {module.weight.dtype}")
            one.taken, one.given, one.bias_first = one.type, one.type, 1
            one.weight = self._pointer(module.weight[part])
        elif type(module) is Int8Linear:
            one.type = native.INT8
            one.weight = self._pointer(module.weight_int8[part])
            one.scale = self._pointer(module.scale[part])
        elif type(module) is Int4Linear and module.layout.startswith("blocks"):
            block = block_of(module.layout)
            if part.start % UNIT or (part.start and part.stop % UNIT):
                raise LabError(f"channels {part.start} to {part.stop} are no whole blocks")
            one.type, one.group, one.block, one.stride = (
                native.INT4,
                module.group_size,
                block,
                module.out_features,
            )
            one.weight = self._pointer(module.packed[part])  # blocks lie one after another, as channels do
            one.scale = self._pointer(module.scale_zero) + 4 * part.start
        else:
            told = f"{type(module).__name__}, {getattr(module, 'layout', 'plain')} layout"
            raise LabError(f"a Linear is of a kind that is left to torch ({told})")
        if module.bias is not None:
            one.bias = self._floats(module.bias[part])
        return one

    def _pointer(self, tensor: Tensor) -> int:
        tensor = tensor.detach()
        if tensor.device.type != "cpu" or not tensor.is_contiguous():
            raise LabError("a weight is not on the CPU, or not in one piece")
        self._kept.append(tensor)
        return tensor.data_ptr()

    def _floats(self, tensor: Tensor) -> int:
        return self._pointer(tensor.detach().float().contiguous())


def describe(model: nn.Module) -> tuple[NativeStep | None, str]:
    """The compiled step of a model; or None, and why not."""
    try:
        return NativeStep(model), ""
    except LabError as error:
        return None, str(error)


def signature(model: nn.Module) -> tuple:
    """Changes when a module of the decoder or the head is replaced, moved, or hooked."""
    found = []
    for module in _modules(model):
        tensors = (*module._parameters.values(), *module._buffers.values())
        hooked = bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)
        found.append((id(module), hooked, *(tensor.data_ptr() for tensor in tensors if tensor is not None)))
    return tuple(found)


def _modules(model: nn.Module) -> Iterator[nn.Module]:
    yield from model.get_decoder().modules()
    yield model.get_output_embeddings()
    yield model.get_input_embeddings()


def _dtype_of(model: nn.Module) -> torch.dtype:
    """The dtype of the hidden states, after checking that the decoder is one that is known."""
    if not any(cls.__name__ in MODELS for cls in type(model).__mro__):
        raise LabError(f"{type(model).__name__} is left to torch")
    decoder = model.get_decoder()
    kind = type(decoder.layers[0]).__name__
    config = model.config.get_text_config(decoder=True)
    rotary = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if kind not in INTERLEAVED or config.hidden_act != "silu" or rotary not in ROTARY_TYPES:
        raise LabError(f"{kind} with {config.hidden_act} and {rotary} rotation is left to torch")
    if any(
        module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__
        for module in _modules(model)
    ):
        raise LabError("a module of the decoder is watched")
    norms = [one.weight for name, one in decoder.named_modules() if name.endswith("norm")]
    dtypes = {norm.dtype for norm in norms}
    if len(dtypes) != 1 or not dtypes <= set(TYPES) or any(norm.device.type != "cpu" for norm in norms):
        raise LabError("the decoder is not on the CPU, or in several dtypes")
    return dtypes.pop()


def _is_interleaved(decoder: nn.Module) -> bool:
    return INTERLEAVED[type(decoder.layers[0]).__name__]


def _pointers(cache: RowCache, index: int) -> ctypes.Array:
    """Of each layer's keys (0) or values (1)."""
    layers: list[RowLayer] = cache.layers
    return (ctypes.c_void_p * len(layers))(*(layer.buffers[index].data_ptr() for layer in layers))
