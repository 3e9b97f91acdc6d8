"""The pocket model's forward over training batches: the same weights and the same function as its `forward`, but
with equal-sized screens as one batch, convolutions over patches as products, and layers that can be compiled.

A test compares it with `PocketForConditionalGeneration.forward`.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from transformers import Glm4vForConditionalGeneration

from labkit.models.pocket.training.samples import TEXT_LENGTH
from labkit.models.pocket.training.text import PATCH

_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)


def rms(module: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """Glm4vRMSNorm as one fused operation."""
    return F.rms_norm(hidden, (hidden.shape[-1],), module.weight.to(hidden.dtype), module.variance_epsilon)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """GLM's interleaved rotation of the first R channels: x [B, H, L, D], cos and sin [1 or B, 1, L, R]."""
    width = cos.shape[-1]
    rotated, rest = x[..., :width], x[..., width:]
    turned = torch.stack((-rotated[..., 1::2], rotated[..., 0::2]), dim=-1).flatten(-2)
    return torch.cat((rotated * cos + turned * sin, rest), dim=-1)


def _rotate_vision(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin


def vision_block(
    block: nn.Module, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    """One vision layer over hidden [B, P, D]; cos and sin [P, D / heads]."""
    batch, length, width = hidden.shape
    heads = block.attn.num_heads
    query, key, value = (
        block.attn.qkv(rms(block.norm1, hidden)).view(batch, length, 3, heads, -1).permute(2, 0, 3, 1, 4)
    )
    query, key = _rotate_vision(query, cos, sin), _rotate_vision(key, cos, sin)
    attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(batch, length, width)
    hidden = hidden + block.attn.proj(attended)
    normed = rms(block.norm2, hidden)
    return hidden + block.mlp.down_proj(F.silu(block.mlp.gate_proj(normed)) * block.mlp.up_proj(normed))


def cross_modal_layer(layer, hidden, cos, sin, visible) -> torch.Tensor:
    """One cross-modal layer; cos and sin [1, 1, L, R], visible [B, 1, 1, L]."""
    batch, length, width = hidden.shape
    normed = rms(layer.norm1, hidden)
    query, key, value = (
        proj(normed).view(batch, length, layer.num_heads, -1).transpose(1, 2)
        for proj in (layer.q_proj, layer.k_proj, layer.v_proj)
    )
    query, key = _rotate(query, cos, sin), _rotate(key, cos, sin)
    attended = F.scaled_dot_product_attention(query, key, value, attn_mask=visible)
    hidden = hidden + layer.o_proj(attended.transpose(1, 2).reshape(batch, length, width))
    return hidden + layer.fc2(F.gelu(layer.fc1(rms(layer.norm2, hidden))))


def decoder_layer(layer, hidden, cos, sin) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One causal decoder layer: hidden [B, L, D], and head 0's queries and keys [B, L, head] for supervision."""
    batch, length, _ = hidden.shape
    attention = layer.self_attn
    normed = rms(layer.input_layernorm, hidden)
    query, key, value = (
        proj(normed).view(batch, length, -1, attention.head_dim).transpose(1, 2)
        for proj in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    query, key = _rotate(query, cos, sin), _rotate(key, cos, sin)
    attended = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    attended = attention.o_proj(attended.transpose(1, 2).reshape(batch, length, -1))
    hidden = hidden + rms(layer.post_self_attn_layernorm, attended)
    gate, up = layer.mlp.gate_up_proj(rms(layer.post_attention_layernorm, hidden)).chunk(2, dim=-1)
    written = layer.mlp.down_proj(up * F.silu(gate))
    return hidden + rms(layer.post_mlp_layernorm, written), query[:, 0], key[:, 0]


def normalize_channels(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> torch.Tensor:
    """GELU of the layer norm over channels of hidden [B, C, T], without turning it round."""
    wide = hidden.float()
    mean = wide.mean(1, keepdim=True)
    spread = (wide - mean).square().mean(1, keepdim=True)
    normed = (wide - mean) * torch.rsqrt(spread + eps) * weight[:, None] + bias[:, None]
    return F.gelu(normed).to(hidden.dtype)


def hear(
    speech: nn.Module, audio: torch.Tensor, lengths: torch.Tensor, norm=normalize_channels
) -> torch.Tensor:
    """Wav2Vec2Model's frames [B, T, S'] of normalized recordings [B, S] with lengths [B]."""
    hidden = audio[:, None]
    for layer in speech.feature_extractor.conv_layers:
        hidden = norm(
            layer.conv(hidden), layer.layer_norm.weight, layer.layer_norm.bias, layer.layer_norm.eps
        )
    features = hidden.transpose(1, 2)
    inside = torch.arange(audio.shape[1], device=audio.device)[None] < lengths[:, None]
    mask = speech._get_feature_vector_attention_mask(features.shape[1], inside.long(), add_adapter=False)
    projected, _ = speech.feature_projection(features)
    return speech.encoder(projected, attention_mask=mask).last_hidden_state


class BatchedForward:
    """Runs training batches through a pocket model, or a plain Glm4v, which has no ear and no cross-modal block.

    `compile_layers` makes each kind of layer one compiled function.
    """

    def __init__(self, model: Glm4vForConditionalGeneration, *, compile_layers: bool = False) -> None:
        self.model = model
        functions = (vision_block, cross_modal_layer, decoder_layer)
        if compile_layers:  # a graph for each kind of batch and size of screen
            torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        compiled = [torch.compile(f, dynamic=False) for f in functions] if compile_layers else functions
        self.vision_block, self.cross_modal_layer, self.decoder_layer = compiled
        self.normalize_channels = (
            torch.compile(normalize_channels, dynamic=True) if compile_layers else normalize_channels
        )
        self._constants: dict[tuple, tuple[torch.Tensor, ...]] = {}  # what depends on the screen's size alone

    # -- the eye ------------------------------------------------------------------------------------------------

    def see(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Screens [B, H, W, 3], uint8 or float 0..255 -> image tokens [B, N, D] and the patches before them [B, 4 N, D']."""
        visual = self.model.model.visual
        batch, high, wide, _ = pixels.shape
        rows, columns, size = high // PATCH, wide // PATCH, PATCH // 2
        key = ("see", rows, columns, pixels.device)
        if key not in self._constants:
            colours = (torch.tensor(v, device=pixels.device) * 255 for v in (_MEAN, _STD))
            self._constants[key] = (*colours, *self._grid(rows, columns, pixels.device))
        mean, std, vertical, horizontal = self._constants[key]
        x = (pixels - mean) / std
        # patches in groups of 2x2 that become one image token, as Glm4vImageProcessor orders them
        x = x.view(batch, rows, 2, size, columns, 2, size, 3).permute(0, 1, 4, 2, 5, 7, 3, 6)
        x = x.reshape(batch, rows * columns * 4, -1)
        weight = visual.patch_embed.proj.weight.sum(2).flatten(1)  # both frames of a still image are the same
        hidden = rms(
            visual.post_conv_layernorm, F.linear(x.to(weight.dtype), weight, visual.patch_embed.proj.bias)
        )
        hidden = hidden + self._positions(visual, vertical, horizontal, 2 * rows, 2 * columns).to(
            hidden.dtype
        )
        angles = visual.rotary_pos_emb.inv_freq.to(pixels.device)
        angles = torch.cat((vertical[:, None] * angles, horizontal[:, None] * angles), dim=-1)
        cos, sin = (f(torch.cat((angles, angles), dim=-1)).to(hidden.dtype) for f in (torch.cos, torch.sin))
        for block in visual.blocks:
            hidden = self.vision_block(block, hidden, cos, sin)
        patches = rms(visual.post_layernorm, hidden)
        joined = visual.downsample.weight.permute(0, 2, 3, 1).flatten(1)
        hidden = F.linear(patches.view(batch, rows * columns, -1), joined, visual.downsample.bias)
        return visual.merger(hidden), patches

    @staticmethod
    def _grid(rows: int, columns: int, device) -> tuple[torch.Tensor, torch.Tensor]:
        """Vertical and horizontal place of every patch in the processor's order."""
        places = torch.stack(
            torch.meshgrid(torch.arange(2 * rows), torch.arange(2 * columns), indexing="ij"), -1
        )
        places = places.view(rows, 2, columns, 2, 2).permute(0, 2, 1, 3, 4).reshape(-1, 2).to(device)
        return places[:, 0].float(), places[:, 1].float()

    @staticmethod
    def _positions(visual, vertical, horizontal, high: int, wide: int) -> torch.Tensor:
        table = visual.embeddings.position_embedding.weight.float()
        side = int(table.shape[0] ** 0.5)
        grid = torch.stack(((horizontal + 0.5) / wide * 2 - 1, (vertical + 0.5) / high * 2 - 1), -1)[
            None, :, None
        ]
        table = table.view(1, side, side, -1).permute(0, 3, 1, 2)
        sampled = F.grid_sample(table, grid, mode="bicubic", align_corners=False, padding_mode="border")
        return sampled[0, :, :, 0].T

    # -- the ear ------------------------------------------------------------------------------------------------

    def hear(self, audio: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Normalized recordings [B, S] with lengths [B] -> encoder frames [B, T, S']."""
        return hear(self.model.model.speech, audio, lengths, self.normalize_channels)

    # -- the whole ----------------------------------------------------------------------------------------------

    def positions(self, rows: int, columns: int, device) -> torch.Tensor:
        """Position ids [3, 1, L] of the shared layout (see train_samples)."""
        before = 5 if rows else 0
        text = TEXT_LENGTH - before
        start = before + max(rows, columns)
        head = torch.arange(before).expand(3, -1)
        image = torch.stack(
            (
                torch.full((rows * columns,), before),
                before + torch.arange(rows).repeat_interleave(columns),
                before + torch.arange(columns).repeat(rows),
            )
        )
        tail = (start + torch.arange(text)).expand(3, -1)
        return torch.cat((head, image, tail), dim=1)[:, None].to(device)

    def __call__(self, ids, prompt, image=None, audio=None, audio_source=None, grid=(0, 0)):
        """ids [B, L], prompt lengths [B], image tokens [B, N, D], speech tokens [B, A, D] with their places.

        Returns the decoder's output [B, L, D], the cross-modal block's output (None without one), and head 0's
        queries and keys of every decoder layer.
        """
        model = self.model.model
        hidden = F.embedding(ids, model.language_model.embed_tokens.weight)
        if image is not None:
            before, tokens = 5, image.shape[1]
            hidden = torch.cat(
                (hidden[:, :before], image.to(hidden.dtype), hidden[:, before + tokens :]), dim=1
            )
        if audio is not None:
            source = audio_source.long()
            placed = torch.gather(
                audio, 1, source.clamp(0, audio.shape[1] - 1)[..., None].expand(-1, -1, audio.shape[2])
            )
            hidden = torch.where((source >= 0)[..., None], placed.to(hidden.dtype), hidden)
        if torch.is_autocast_enabled(hidden.device.type):
            hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
        key = ("positions", *grid, ids.device)
        if key not in self._constants:
            self._constants[key] = (self.positions(*grid, ids.device),)
        position_ids = self._constants[key][0]
        cos, sin = (t[:, None] for t in model.language_model.rotary_emb(hidden, position_ids=position_ids))
        mixed = None
        if hasattr(model, "cross_modal"):
            seen = torch.arange(ids.shape[1], device=ids.device)[None] < prompt[:, None]
            mixed = hidden
            for layer in model.cross_modal.layers:
                mixed = self.cross_modal_layer(layer, mixed, cos, sin, seen[:, None, None, :])
            hidden = torch.where(seen[..., None], mixed, hidden)
        looks = []
        for layer in model.language_model.layers:
            hidden, query, key = self.decoder_layer(layer, hidden, cos, sin)
            looks.append((query, key))
        return rms(model.language_model.norm, hidden), mixed, looks
