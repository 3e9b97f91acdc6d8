"""What a decoder of the Glm4v family is made of, laid out for a step that calls none of its modules' forwards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.models.glm4v import modeling_glm4v as glm4v


class UnknownDecoderError(Exception):
    """A decoder that the static step does not know; says what about it."""


@dataclass(frozen=True)
class Layer:
    """One decoder layer: its Linears (or what replaced them), and the weights [hidden] of its four norms."""

    qkv: tuple[nn.Module, nn.Module, nn.Module]
    o: nn.Module
    gate_up: nn.Module
    down: nn.Module
    before_attention: Tensor
    after_attention: Tensor
    before_mlp: Tensor
    after_mlp: Tensor


@dataclass(frozen=True)
class Decoder:
    """A Glm4v text model with its head.

    Attributes:
        embed: token ids -> [..., hidden].
        layers: from the first to the last.
        last_norm: weight of the norm before the head.
        head: hidden -> vocabulary.
        heads, groups, head_dim: query heads, key heads, and the width of one.
        frequency: fp32 [rotated / 2], by which a position turns each pair of the first ``rotated`` values of a head.
        eps: of the norms.
        dtype: in which the step computes.
    """

    embed: nn.Module
    layers: tuple[Layer, ...]
    last_norm: Tensor
    head: nn.Module
    heads: int
    groups: int
    head_dim: int
    frequency: Tensor
    eps: float
    dtype: torch.dtype

    @property
    def device(self) -> torch.device:
        return self.last_norm.device

    @property
    def hidden(self) -> int:
        return self.last_norm.shape[0]

    @property
    def rotated(self) -> int:
        """Values of a head that turn with the position."""
        return 2 * self.frequency.shape[0]

    @property
    def scaling(self) -> float:
        """Of the attention's scores."""
        return self.head_dim**-0.5


def decoder_of(model: nn.Module) -> Decoder:
    """The decoder and head of a Glm4v model, or of one that subclasses it.

    Raises:
        UnknownDecoderError: any other; the message says what is not as it would have to be.
    """
    text = model.get_decoder() if hasattr(model, "get_decoder") else None
    if type(text) is not glm4v.Glm4vTextModel:
        raise UnknownDecoderError(f"its decoder is a {type(text).__name__}, not a Glm4vTextModel")
    config = text.config
    if config.hidden_act != "silu":
        raise UnknownDecoderError(f"its activation is {config.hidden_act}, not silu")
    if text.rotary_emb.rope_type != "default" or text.rotary_emb.attention_scaling != 1:
        raise UnknownDecoderError(f"its positions are of the kind {text.rotary_emb.rope_type}, not default")
    devices = {parameter.device for parameter in (*text.parameters(), *text.buffers())}
    if len(devices) != 1:
        raise UnknownDecoderError(f"its parts lie on {len(devices)} devices")
    norm = text.norm.weight.detach()
    head_dim = config.hidden_size // config.num_attention_heads
    if head_dim & (head_dim - 1):
        raise UnknownDecoderError(f"its heads are {head_dim} wide, not a power of two")
    return Decoder(
        embed=text.embed_tokens,
        layers=tuple(_layer(index, layer) for index, layer in enumerate(text.layers)),
        last_norm=norm,
        head=model.get_output_embeddings(),
        heads=config.num_attention_heads,
        groups=config.num_key_value_heads,
        head_dim=head_dim,
        frequency=text.rotary_emb.inv_freq.float(),
        eps=text.norm.variance_epsilon,
        dtype=norm.dtype,
    )


_PARTS: Mapping[str, type[nn.Module]] = {
    "": glm4v.Glm4vTextDecoderLayer,
    "self_attn": glm4v.Glm4vTextAttention,
    "mlp": glm4v.Glm4vTextMLP,
    "input_layernorm": glm4v.Glm4vRMSNorm,
    "post_self_attn_layernorm": glm4v.Glm4vRMSNorm,
    "post_attention_layernorm": glm4v.Glm4vRMSNorm,
    "post_mlp_layernorm": glm4v.Glm4vRMSNorm,
}


def _layer(index: int, layer: nn.Module) -> Layer:
    for name, kind in _PARTS.items():
        part = layer.get_submodule(name)
        if type(part) is not kind:
            where = ".".join(filter(None, (f"layers.{index}", name)))
            raise UnknownDecoderError(f"{where} is a {type(part).__name__}, not a {kind.__name__}")
        if part._forward_hooks or part._forward_pre_hooks:
            raise UnknownDecoderError(f"layers.{index} has hooks, which the step would not run")
    attention, mlp = layer.self_attn, layer.mlp
    return Layer(
        qkv=(attention.q_proj, attention.k_proj, attention.v_proj),
        o=attention.o_proj,
        gate_up=mlp.gate_up_proj,
        down=mlp.down_proj,
        before_attention=layer.input_layernorm.weight.detach(),
        after_attention=layer.post_self_attn_layernorm.weight.detach(),
        before_mlp=layer.post_attention_layernorm.weight.detach(),
        after_mlp=layer.post_mlp_layernorm.weight.detach(),
    )
