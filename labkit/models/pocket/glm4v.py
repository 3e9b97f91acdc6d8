"""pocket-glm4v: a phone agent of transformers' plain Glm4vForConditionalGeneration, which other engines load too."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Regex, pre_tokenizers
from transformers import Glm4vConfig, PreTrainedTokenizerFast
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil

MAX_PIXELS = 280 * 588
MIN_PIXELS = 112 * 112
TEMPORAL = 2  # frames in a patch of the vision encoder; a still image is repeated
# GLM-4's own: llama.cpp knows tokenizers by name, and this one as `chatglm-bpe`
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def plain_config(token_ids: dict[str, int], vocab_size: int, tiny: bool = False) -> Glm4vConfig:
    """The shipped model's sizes (under 16 M parameters), or those for unit tests; ``token_ids``: special tokens -> ids.

    Widths are multiples of 256, the block length of llama.cpp's K-quants.
    """
    end = token_ids["<|endoftext|>"]
    hidden, seen, layers, depth = (256, 256, 2, 1) if tiny else (512, 256, 4, 5)
    return Glm4vConfig(
        text_config={
            "vocab_size": vocab_size, "hidden_size": hidden, "intermediate_size": 256 if tiny else 768,
            "num_hidden_layers": layers, "num_attention_heads": hidden // 64, "num_key_value_heads": 2,
            "max_position_embeddings": 4096, "pad_token_id": end, "eos_token_id": [end, token_ids["<|user|>"]],
            "bos_token_id": token_ids["[gMASK]"],
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5,
                "mrope_section": [4, 6, 6],
            },
        },
        vision_config={
            "depth": depth, "hidden_size": seen, "num_heads": seen // 64, "out_hidden_size": hidden,
            "intermediate_size": 256, "image_size": 336,
        },
        image_token_id=token_ids["<|image|>"], video_token_id=token_ids["<|video|>"],
        image_start_token_id=token_ids["<|begin_of_image|>"], image_end_token_id=token_ids["<|end_of_image|>"],
        video_start_token_id=token_ids["<|begin_of_video|>"], video_end_token_id=token_ids["<|end_of_video|>"],
        tie_word_embeddings=False, architectures=["Glm4vForConditionalGeneration"],
    )  # fmt: skip


def split_as_glm(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The tokenizer with GLM-4's splitting of text in place of its own, in place.

    The merges stay those that the vocabulary was trained on. None of them joins two Chinese characters, so characters
    stay tokens, though this pattern does not separate them.
    """
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return tokenizer


def save_processor(tokenizer: PreTrainedTokenizerFast, folder: str | Path) -> None:
    """Writes tokenizer, chat template and image settings beside the model's weights, as the 9 B model's stand there."""
    tokenizer.save_pretrained(folder)
    size = {"shortest_edge": TEMPORAL * MIN_PIXELS, "longest_edge": TEMPORAL * MAX_PIXELS}
    Glm4vImageProcessorPil(size=size).save_pretrained(folder)
