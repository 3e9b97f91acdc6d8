"""A tiny Llama as a GGUF file, written value by value: layers in Q4_1, embedding in Q8_0, norms in F32."""

import struct

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from tokenizers import pre_tokenizers

HIDDEN, INNER, LAYERS, HEADS, KEY_HEADS = 64, 128, 2, 2, 1
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
TOKENS = ["<|endoftext|>", "<|im_end|>", *ALPHABET, "ab", "abc"]
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def q4_1(generator, rows, columns):
    """Random blocks, and the values they mean."""
    blocks = rows * columns // 32
    scale = generator.uniform(0.005, 0.02, blocks).astype(np.float16)
    low = generator.uniform(-0.15, -0.05, blocks).astype(np.float16)
    codes = generator.integers(0, 16, (blocks, 32), dtype=np.uint8)
    raw = b"".join(
        struct.pack("<ee", s, m) + bytes(c[:16] | (c[16:] << 4)) for s, m, c in zip(scale, low, codes)
    )
    values = codes * scale.astype(np.float32)[:, None] + low.astype(np.float32)[:, None]
    return np.frombuffer(raw, np.uint8).reshape(rows, -1), values.reshape(rows, columns)


def q8_0(generator, rows, columns):
    """Random blocks, and the values they mean."""
    blocks = rows * columns // 32
    scale = generator.uniform(0.005, 0.02, blocks).astype(np.float16)
    codes = generator.integers(-127, 128, (blocks, 32), dtype=np.int8)
    raw = b"".join(struct.pack("<e", s) + c.tobytes() for s, c in zip(scale, codes))
    values = codes * scale.astype(np.float32)[:, None]
    return np.frombuffer(raw, np.uint8).reshape(rows, -1), values.reshape(rows, columns)


def write(path, **changed):
    """The file; returns {tensor: its values}."""
    generator = np.random.default_rng(0)
    facts = {
        "llama.block_count": LAYERS,
        "llama.context_length": 512,
        "llama.embedding_length": HIDDEN,
        "llama.feed_forward_length": INNER,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KEY_HEADS,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 10000.0,
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [3, 3, *[1] * (len(TOKENS) - 2)],
        "tokenizer.ggml.merges": ["a b", "ab c"],
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.chat_template": TEMPLATE,
        **changed,
    }
    file, values = GGUFWriter(path, facts.pop("general.architecture", "llama")), {}
    adders = {str: file.add_string, float: file.add_float32, int: file.add_uint32, list: file.add_array}
    for key, value in facts.items():
        adders[type(value)](key, value)

    def add(name, raw, kind):
        file.add_tensor(f"{name}.weight", raw, raw_dtype=kind)

    raw, values["token_embd.weight"] = q8_0(generator, len(TOKENS), HIDDEN)
    add("token_embd", raw, GGMLQuantizationType.Q8_0)
    sizes = {
        "attn_q": (HIDDEN, HIDDEN), "attn_k": (HIDDEN // 2, HIDDEN), "attn_v": (HIDDEN // 2, HIDDEN),
        "attn_output": (HIDDEN, HIDDEN), "ffn_gate": (INNER, HIDDEN), "ffn_up": (INNER, HIDDEN),
        "ffn_down": (HIDDEN, INNER),
    }  # fmt: skip
    for layer in range(LAYERS):
        for name, (rows, columns) in sizes.items():
            raw, values[f"blk.{layer}.{name}.weight"] = q4_1(generator, rows, columns)
            add(f"blk.{layer}.{name}", raw, GGMLQuantizationType.Q4_1)
        for name in ("attn_norm", "ffn_norm"):
            norm = generator.uniform(0.5, 1.5, HIDDEN).astype(np.float32)
            values[f"blk.{layer}.{name}.weight"] = norm
            add(f"blk.{layer}.{name}", norm, GGMLQuantizationType.F32)
    values["output_norm.weight"] = np.ones(HIDDEN, np.float32)
    add("output_norm", values["output_norm.weight"], GGMLQuantizationType.F32)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return values
