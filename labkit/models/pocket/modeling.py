"""The pocket phone agent: Glm4v's vision encoder and decoder, a Wav2Vec2 speech encoder, and a cross-modal block.

    image -> model.visual ----------------.
    sound -> model.speech -> projector ----> model.cross_modal -> model.language_model -> lm_head
    text  -> embed_tokens ----------------'

The cross-modal block lets image, speech and prompt features attend to each other in both directions, which the
causal decoder cannot do (image tokens precede the instruction). It processes the prompt only: generated tokens
go straight to the decoder, so the key-value cache works as usual.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import _WeightNorm
from transformers import Glm4vForConditionalGeneration, Glm4vModel, Wav2Vec2Model
from transformers.models.auto import AutoModelForImageTextToText
from transformers.models.glm4v.modeling_glm4v import Glm4vRMSNorm, Glm4vVisionPatchEmbed, apply_rotary_pos_emb
from transformers.utils import can_return_tuple

from labkit.models.pocket.configuration import PocketConfig
from labkit.quantization.logits import keep_logits_


class CrossModalLayer(nn.Module):
    """Bidirectional attention and a feed-forward over features [B, L, D], both pre-normalized and residual."""

    def __init__(self, config: PocketConfig) -> None:
        super().__init__()
        text = config.text_config
        hidden = text.hidden_size
        self.num_heads = text.num_attention_heads
        self.norm1 = Glm4vRMSNorm(hidden, eps=text.rms_norm_eps)
        self.q_proj = nn.Linear(hidden, hidden)
        self.k_proj = nn.Linear(hidden, hidden)
        self.v_proj = nn.Linear(hidden, hidden)
        self.o_proj = nn.Linear(hidden, hidden, bias=False)
        self.norm2 = Glm4vRMSNorm(hidden, eps=text.rms_norm_eps)
        self.fc1 = nn.Linear(hidden, config.cross_modal_intermediate_size)
        self.fc2 = nn.Linear(config.cross_modal_intermediate_size, hidden)

    def forward(
        self, hidden: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor], mask: torch.Tensor | None
    ):
        """hidden [B, L, D]; rotary cos and sin [B, L, R]; mask [B, 1, 1, L], true where a feature may be seen."""
        batch, length, width = hidden.shape
        normed = self.norm1(hidden)
        query, key, value = (
            proj(normed).view(batch, length, self.num_heads, -1).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = apply_rotary_pos_emb(query, key, *rotary)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        hidden = hidden + self.o_proj(attended.transpose(1, 2).reshape(batch, length, width))
        return hidden + self.fc2(F.gelu(self.fc1(self.norm2(hidden))))


class CrossModalBlock(nn.Module):
    """A stack of `CrossModalLayer`s."""

    def __init__(self, config: PocketConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(CrossModalLayer(config) for _ in range(config.cross_modal_layers))

    def forward(
        self, hidden: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor], mask: torch.Tensor | None
    ):
        """As `CrossModalLayer.forward`."""
        for layer in self.layers:
            hidden = layer(hidden, rotary, mask)
        return hidden


class SpeechProjector(nn.Module):
    """Joins groups of encoder frames and maps them to the decoder's width: [B, T, S] -> [B, ceil(T / F), D]."""

    def __init__(self, config: PocketConfig) -> None:
        super().__init__()
        self.frames = config.frames_per_token
        hidden = config.text_config.hidden_size
        self.linear_1 = nn.Linear(config.speech_config.hidden_size * self.frames, hidden)
        self.linear_2 = nn.Linear(hidden, hidden)
        self.norm = Glm4vRMSNorm(hidden, eps=config.text_config.rms_norm_eps)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        """frames [B, T, S] -> [B, ceil(T / F), D]; missing frames at the end count as zeros."""
        frames = F.pad(frames, (0, 0, 0, -frames.shape[1] % self.frames))
        joined = frames.reshape(frames.shape[0], frames.shape[1] // self.frames, -1)
        return self.norm(self.linear_2(F.gelu(self.linear_1(joined))))


def encoder_frames(samples: int, config: PocketConfig) -> int:
    """Frames that the speech encoder computes from `samples` samples: one every 20 ms, less the filters' width."""
    for kernel, stride in zip(config.speech_config.conv_kernel, config.speech_config.conv_stride):
        samples = (samples - kernel) // stride + 1
    return max(samples, 0)


def speech_tokens(samples: int, config: PocketConfig) -> int:
    """Speech tokens that a recording of `samples` samples takes in the prompt."""
    return -(-encoder_frames(samples, config) // config.frames_per_token)


class PatchEmbed(Glm4vVisionPatchEmbed):
    """Glm4v's patch embedding as a matrix product: its stride equals its kernel, so patches do not overlap."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Patches [P, C * T * S * S] -> [P, D], the same values as the convolution's."""
        weight = self.proj.weight
        return F.linear(hidden_states.to(weight.dtype), weight.flatten(1), self.proj.bias)


class Downsample(nn.Conv2d):
    """Glm4v's 2x2 downsampling as a matrix product; inputs [N, C, 2, 2] -> [N, D, 1, 1]."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """See the class."""
        return F.linear(hidden.flatten(1), self.weight.flatten(1), self.bias)[..., None, None]


class SteadyWeightNorm(_WeightNorm):
    """torch's weight normalization, summed in fp64: with fp32 sums the weight depends on the number of threads, and with
    it all that a spoken item calibrates."""

    def forward(self, weight_g: torch.Tensor, weight_v: torch.Tensor) -> torch.Tensor:
        direction = weight_v.double()
        others = [dim for dim in range(direction.ndim) if dim != self.dim % direction.ndim]
        length = direction.square().sum(others, keepdim=True).sqrt()
        return (direction * (weight_g.double() / length)).to(weight_v.dtype)


def use_steady_weight_norm_(model: nn.Module) -> None:
    """Replace torch's weight normalization in ``model``; the names of its parameters stay."""
    for module in model.modules():
        if type(module) is _WeightNorm:
            module.__class__ = SteadyWeightNorm


class PocketModel(Glm4vModel):
    """Glm4vModel with a speech encoder, its projector and the cross-modal block."""

    config: PocketConfig

    def __init__(self, config: PocketConfig) -> None:
        super().__init__(config)
        vision = config.vision_config
        size = vision.spatial_merge_size
        self.visual.patch_embed = PatchEmbed(vision)
        self.visual.downsample = Downsample(vision.hidden_size, vision.out_hidden_size, size, stride=size)
        self.speech = Wav2Vec2Model(config.speech_config)
        use_steady_weight_norm_(self.speech)
        self.speech_projector = SpeechProjector(config)
        self.cross_modal = CrossModalBlock(config)
        self.post_init()

    def get_audio_features(self, input_features: torch.Tensor, audio_lengths: torch.Tensor) -> torch.Tensor:
        """Recordings [N, samples], padded, with their lengths [N] -> the concatenated speech tokens of all [M, D].

        Each recording is encoded alone, so that its features do not depend on the rest of the batch.
        """
        features = []
        for recording, length in zip(input_features, audio_lengths.tolist()):
            frames = self.speech(recording[None, :length].to(self.speech.dtype)).last_hidden_state
            features.append(self.speech_projector(frames)[0])
        return torch.cat(features)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values=None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_grid_thw: torch.LongTensor | None = None,
        mm_token_type_ids: torch.IntTensor | None = None,
        input_features: torch.Tensor | None = None,
        audio_lengths: torch.Tensor | None = None,
        prompt_mask: torch.Tensor | None = None,
        mm_encoder_outputs: dict | None = None,
        **kwargs,
    ):
        """As Glm4vModel.forward, with recordings `input_features` [N, samples] and `audio_lengths` [N].

        `prompt_mask` [B, L] marks the prompt where answer tokens follow it in the same call (training); without
        it the whole first call is prompt and later calls are not.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        images = (mm_encoder_outputs or {}).get("image")
        if images is None and pixel_values is not None:
            images = self.get_image_features(pixel_values, image_grid_thw, return_dict=True)
        if images is not None:
            features = torch.cat(tuple(images.pooler_output)).to(inputs_embeds.device, inputs_embeds.dtype)
            mask, _ = self.get_placeholder_mask(input_ids, inputs_embeds, image_features=features)
            inputs_embeds = inputs_embeds.masked_scatter(mask.expand_as(inputs_embeds), features)
        if input_features is not None:
            features = self.get_audio_features(input_features, audio_lengths).to(inputs_embeds.dtype)
            mask = (input_ids == self.config.audio_token_id).unsqueeze(-1)
            if int(mask.sum()) != len(features):
                raise ValueError(
                    f"{int(mask.sum())} audio tokens in the prompt, {len(features)} in the recordings"
                )
            inputs_embeds = inputs_embeds.masked_scatter(mask.expand_as(inputs_embeds), features)
        if position_ids is None:
            position_ids = self.compute_3d_position_ids(
                input_ids=input_ids, image_grid_thw=image_grid_thw, inputs_embeds=inputs_embeds,
                attention_mask=attention_mask, past_key_values=past_key_values, mm_token_type_ids=mm_token_type_ids,
            )  # fmt: skip
            if position_ids is None and past_length == 0:
                position_ids = _text_positions(inputs_embeds, attention_mask)
                self.rope_deltas = torch.zeros(
                    len(inputs_embeds), 1, dtype=torch.long, device=inputs_embeds.device
                )
        if past_length == 0:
            inputs_embeds = self.mix(inputs_embeds, position_ids, attention_mask, prompt_mask)
        return self.language_model(
            input_ids=None, position_ids=position_ids, attention_mask=attention_mask,
            past_key_values=past_key_values, inputs_embeds=inputs_embeds, **kwargs,
        )  # fmt: skip

    def mix(self, inputs_embeds, position_ids, attention_mask=None, prompt_mask=None) -> torch.Tensor:
        """Runs the cross-modal block over the prompt's features; the rest of `inputs_embeds` [B, L, D] stays."""
        rotary = self.language_model.rotary_emb(inputs_embeds, position_ids=position_ids[-3:])
        seen = prompt_mask if prompt_mask is not None else attention_mask
        if seen is None or seen.ndim != 2 or seen.shape[1] != inputs_embeds.shape[1]:
            return self.cross_modal(inputs_embeds, rotary, None)
        seen = seen.bool()
        # a row whose mask is empty (padding only) would become NaN: let it attend to everything; it is dropped below
        visible = (seen | ~seen.any(-1, keepdim=True))[:, None, None, :]
        mixed = self.cross_modal(inputs_embeds, rotary, visible)
        return torch.where(seen[..., None], mixed, inputs_embeds)


def _text_positions(inputs_embeds: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """Positions [3, B, L] of a prompt without images; padding on the left does not count."""
    batch, length, _ = inputs_embeds.shape
    if attention_mask is None or attention_mask.ndim != 2:
        positions = torch.arange(length, dtype=torch.int64, device=inputs_embeds.device)[None].expand(
            batch, -1
        )
    else:
        positions = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    return positions[None].expand(3, -1, -1)


class PocketForConditionalGeneration(Glm4vForConditionalGeneration):
    """The pocket phone agent with its language-model head; works with transformers' `generate`.

    Its logits are fp32 in every compute dtype: rounded to bf16, neighbouring coordinates would tie.
    """

    config: PocketConfig
    config_class = PocketConfig

    def __init__(self, config: PocketConfig) -> None:
        super().__init__(config)
        self.model = PocketModel(config)
        self.post_init()
        keep_logits_(self)

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        pixel_values=None,
        image_grid_thw=None,
        mm_token_type_ids=None,
        input_features=None,
        audio_lengths=None,
        logits_to_keep=0,
        mm_encoder_outputs=None,
        **kwargs,
    ):
        """As Glm4vForConditionalGeneration.forward, with `input_features` and `audio_lengths` for recordings."""
        return super().forward(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=past_key_values, inputs_embeds=inputs_embeds, labels=labels, pixel_values=pixel_values,
            image_grid_thw=image_grid_thw, mm_token_type_ids=mm_token_type_ids, logits_to_keep=logits_to_keep,
            mm_encoder_outputs=mm_encoder_outputs, input_features=input_features, audio_lengths=audio_lengths,
            **kwargs,
        )  # fmt: skip

    def prepare_inputs_for_generation(self, input_ids, past_key_values=None, **kwargs):
        """Passes recordings on in the first step only, like images."""
        inputs = super().prepare_inputs_for_generation(input_ids, past_key_values=past_key_values, **kwargs)
        if past_key_values is not None and past_key_values.get_seq_length() > 0:
            inputs["input_features"] = inputs["audio_lengths"] = None
        return inputs


AutoModelForImageTextToText.register(PocketConfig, PocketForConditionalGeneration, exist_ok=True)
