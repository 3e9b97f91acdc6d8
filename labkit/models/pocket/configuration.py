"""Configuration of the pocket phone agent: GLM-4.1V's configuration, plus a speech encoder and a cross-modal block."""

from __future__ import annotations

from typing import ClassVar

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, Glm4vConfig, Wav2Vec2Config

FRAMES_PER_TOKEN = 4  # 50 encoder frames a second become 12.5 speech tokens a second


@strict
class PocketConfig(Glm4vConfig):
    """Four parts: ViT (`vision_config`), GLM decoder (`text_config`), Wav2Vec2 (`speech_config`), cross-modal block.

    `cross_modal_layers` bidirectional attention layers over image, speech and prompt features precede the
    decoder; their feed-forward width is `cross_modal_intermediate_size`. `frames_per_token` encoder frames
    (20 ms each) form a speech token.
    """

    model_type = "pocket_phone"
    sub_configs_defaults: ClassVar = {**Glm4vConfig.sub_configs_defaults, "speech_config": Wav2Vec2Config}

    speech_config: dict | object | None = None
    audio_token_id: int = 0
    cross_modal_layers: int = 2
    cross_modal_intermediate_size: int = 768
    frames_per_token: int = FRAMES_PER_TOKEN

    @classmethod
    def standard(cls, token_ids: dict[str, int], vocab_size: int) -> PocketConfig:
        """The shipped model's sizes (about 28 M parameters); `token_ids` maps special tokens to ids."""
        return cls._build(
            token_ids, vocab_size, hidden=384, ffn=1024, layers=6, heads=6, depth=6, vision_ffn=768,
            speech_layers=5, speech_hidden=256, speech_ffn=1024, conv_dim=(64, 128, 128, 256, 256, 256, 256),
        )  # fmt: skip

    @classmethod
    def tiny(cls, token_ids: dict[str, int] | None = None, vocab_size: int = 512) -> PocketConfig:
        """The same four parts at a size for unit tests (under 2 M parameters)."""
        from labkit.models.pocket.tokenizer import SPECIAL_TOKENS

        ids = token_ids or {token: i for i, token in enumerate(SPECIAL_TOKENS)}
        return cls._build(
            ids, vocab_size, hidden=128, ffn=128, layers=3, heads=2, depth=2, vision_ffn=128,
            speech_layers=1, speech_hidden=128, speech_ffn=128, conv_dim=(128,) * 7,
        )  # fmt: skip

    @classmethod
    def _build(
        cls, ids, vocab_size, *, hidden, ffn, layers, heads, depth, vision_ffn, speech_layers, speech_hidden, speech_ffn,
        conv_dim,
    ) -> PocketConfig:  # fmt: skip
        end = ids["<|endoftext|>"]
        rope = {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
            "mrope_section": [4, 6, 6],
        }
        return cls(
            text_config={
                "vocab_size": vocab_size, "hidden_size": hidden, "intermediate_size": ffn,
                "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": 2,
                "max_position_embeddings": 4096, "rope_parameters": rope, "pad_token_id": end,
                "eos_token_id": [end, ids["<|user|>"]], "bos_token_id": ids["[gMASK]"],
            },
            vision_config={
                "depth": depth, "hidden_size": hidden, "num_heads": heads, "out_hidden_size": hidden,
                "intermediate_size": vision_ffn, "image_size": 336,
            },
            speech_config={
                "hidden_size": speech_hidden, "num_hidden_layers": speech_layers, "num_attention_heads": 4,
                "intermediate_size": speech_ffn, "conv_dim": conv_dim, "feat_extract_norm": "layer",
                "do_stable_layer_norm": True, "num_conv_pos_embeddings": 32, "num_conv_pos_embedding_groups": 8,
                "conv_bias": True, "hidden_dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0,
                "feat_proj_dropout": 0.0, "final_dropout": 0.0, "layerdrop": 0.0, "mask_time_prob": 0.0,
                "vocab_size": 32,
            },
            image_token_id=ids["<|image|>"], video_token_id=ids["<|video|>"], audio_token_id=ids["<|audio|>"],
            image_start_token_id=ids["<|begin_of_image|>"], image_end_token_id=ids["<|end_of_image|>"],
            video_start_token_id=ids["<|begin_of_video|>"], video_end_token_id=ids["<|end_of_video|>"],
            tie_word_embeddings=False, architectures=["PocketForConditionalGeneration"],
        )  # fmt: skip


AutoConfig.register("pocket_phone", PocketConfig, exist_ok=True)
