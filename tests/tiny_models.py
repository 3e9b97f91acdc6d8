"""Tiny random models of the real classes, with a byte-level tokenizer, for the engine's tests."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Glm4vConfig,
    Glm4vForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil

SPECIAL = (
    "<|endoftext|>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
    "<|begin_of_image|>",
    "<|image|>",
    "<|end_of_image|>",
)
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for p in m['content'] %}"
    "{% if p['type'] == 'image' %}<|begin_of_image|><|image|><|end_of_image|>"
    "{% else %}{{ p['text'] }}{% endif %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% if enable_thinking %}<think>{% endif %}{% endif %}"
)


def tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """256 bytes and seven special tokens: one Chinese character is three tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    fast = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=fast,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=list(SPECIAL[1:]),
    )
    made.chat_template = template
    return made


def image_processor() -> Glm4vImageProcessorPil:
    """Small images stay small: 28 x 28 pixels make one token."""
    return Glm4vImageProcessorPil(size={"shortest_edge": 28 * 28 * 2, "longest_edge": 28 * 28 * 2 * 64})


def glm4v_config() -> Glm4vConfig:
    words = tokenizer()
    return Glm4vConfig(
        text_config={
            "vocab_size": len(words),
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "pad_token_id": words.pad_token_id,
            "eos_token_id": words.eos_token_id,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
                "mrope_section": [2, 3, 3],
            },
        },
        vision_config={
            "depth": 2,
            "hidden_size": 128,
            "num_heads": 4,
            "out_hidden_size": 128,
            "intermediate_size": 256,
            "image_size": 56,
        },
        image_token_id=words.convert_tokens_to_ids("<|image|>"),
        video_token_id=words.convert_tokens_to_ids("<|image|>"),
        image_start_token_id=words.convert_tokens_to_ids("<|begin_of_image|>"),
        image_end_token_id=words.convert_tokens_to_ids("<|end_of_image|>"),
    )


def glm4v(seed: int = 0) -> Glm4vForConditionalGeneration:
    return random_model(Glm4vForConditionalGeneration, glm4v_config(), seed)


def llama_config() -> LlamaConfig:
    words = tokenizer()
    return LlamaConfig(
        vocab_size=len(words),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=words.pad_token_id,
        bos_token_id=None,
        eos_token_id=words.eos_token_id,
    )


def llama(seed: int = 0) -> LlamaForCausalLM:
    return random_model(LlamaForCausalLM, llama_config(), seed)


def random_model(cls, config, seed=0):
    torch.manual_seed(seed)
    model = cls(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:  # strong enough that answers differ and do not repeat one token
                parameter.mul_(4.0)
    return model


def pocket_tokenizer() -> PreTrainedTokenizerFast:
    """The pocket's special tokens and template over single bytes."""
    from labkit.models.pocket.tokenizer import CHAT_TEMPLATE, MARKS, SPECIAL_TOKENS

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*SPECIAL_TOKENS, *alphabet]
    fast = Tokenizer(models.BPE({piece: index for index, piece in enumerate(pieces)}, []))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=fast,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=list(SPECIAL_TOKENS[1:]),
    )
    made.add_tokens(list(MARKS))
    made.chat_template = CHAT_TEMPLATE
    return made


def pocket(seed: int = 0):
    """A tiny random pocket model: all four parts, and its real processor."""
    from labkit.models.pocket import PocketConfig, PocketForConditionalGeneration, PocketProcessor

    words = pocket_tokenizer()
    config = PocketConfig.tiny()
    return random_model(PocketForConditionalGeneration, config, seed), PocketProcessor(words, config)


def glm_asr(seed: int = 0):
    """A tiny random GlmAsr (audio and text) and transformers' own processor for it."""
    from transformers import (
        GlmAsrConfig,
        GlmAsrForConditionalGeneration,
        GlmAsrProcessor,
        WhisperFeatureExtractor,
    )

    template = (
        "{% for m in messages %}<|{{ m['role'] }}|>\n{% for p in m['content'] %}"
        "{% if p['type'] == 'audio' %}<|pad|>{% else %}{{ p['text'] }}{% endif %}"
        "{% endfor %}{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    )
    words = tokenizer(template)
    words.add_tokens(["<|pad|>"], special_tokens=True)
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4}
    config = GlmAsrConfig(
        text_config={
            **sizes,
            "vocab_size": len(words),
            "num_hidden_layers": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "bos_token_id": None,
            "eos_token_id": words.eos_token_id,
            "pad_token_id": words.pad_token_id,
        },
        audio_config={**sizes, "num_hidden_layers": 1, "num_mel_bins": 16},
        audio_token_id=words.convert_tokens_to_ids("<|pad|>"),
    )
    processor = GlmAsrProcessor(WhisperFeatureExtractor(feature_size=16), words, chat_template=template)
    return random_model(GlmAsrForConditionalGeneration, config, seed), processor
