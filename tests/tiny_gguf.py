"""A tiny Llama as a GGUF file, written value by value: layers in Q4_1, embedding in Q8_0, norms in F32."""

import struct

import numpy as np
from tokenizers import pre_tokenizers

HIDDEN, INNER, LAYERS, HEADS, KEY_HEADS = 64, 128, 2, 2, 1
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
TOKENS = ["<|endoftext|>", "<|im_end|>", *ALPHABET, "ab", "abc"]
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def string(text):
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def fact(key, value):
    if isinstance(value, str):
        return string(key) + struct.pack("<I", 8) + string(value)
    if isinstance(value, float):
        return string(key) + struct.pack("<If", 6, value)
    if isinstance(value, int):
        return string(key) + struct.pack("<II", 4, value)
    inner = 8 if isinstance(value[0], str) else 4
    body = b"".join(string(one) if inner == 8 else struct.pack("<I", one) for one in value)
    return string(key) + struct.pack("<IIQ", 9, inner, len(value)) + body


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
    return raw, values.reshape(rows, columns), codes.reshape(rows, columns)


def q8_0(generator, rows, columns):
    blocks = rows * columns // 32
    scale = generator.uniform(0.005, 0.02, blocks).astype(np.float16)
    codes = generator.integers(-127, 128, (blocks, 32), dtype=np.int8)
    raw = b"".join(struct.pack("<e", s) + c.tobytes() for s, c in zip(scale, codes))
    return raw, (codes * scale.astype(np.float32)[:, None]).reshape(rows, columns)


def write(path, **changed):
    """The file; returns {tensor: its values}."""
    generator = np.random.default_rng(0)
    tensors, values = [], {}
    raw, values["token_embd.weight"] = q8_0(generator, len(TOKENS), HIDDEN)
    tensors.append(("token_embd.weight", (HIDDEN, len(TOKENS)), 8, raw))
    sizes = {
        "attn_q": (HIDDEN, HIDDEN), "attn_k": (HIDDEN // 2, HIDDEN), "attn_v": (HIDDEN // 2, HIDDEN),
        "attn_output": (HIDDEN, HIDDEN), "ffn_gate": (INNER, HIDDEN), "ffn_up": (INNER, HIDDEN),
        "ffn_down": (HIDDEN, INNER),
    }  # fmt: skip
    for layer in range(LAYERS):
        for name, (rows, columns) in sizes.items():
            key = f"blk.{layer}.{name}.weight"
            raw, values[key], _ = q4_1(generator, rows, columns)
            tensors.append((key, (columns, rows), 3, raw))
        for name in ("attn_norm", "ffn_norm"):
            key = f"blk.{layer}.{name}.weight"
            values[key] = generator.uniform(0.5, 1.5, HIDDEN).astype(np.float32)
            tensors.append((key, (HIDDEN,), 0, values[key].tobytes()))
    values["output_norm.weight"] = np.ones(HIDDEN, np.float32)
    tensors.append(("output_norm.weight", (HIDDEN,), 0, values["output_norm.weight"].tobytes()))
    facts = {
        "general.architecture": "llama",
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
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(facts))
    head += b"".join(fact(key, value) for key, value in facts.items())
    body = b""
    for name, dimensions, kind, raw in tensors:
        head += string(name) + struct.pack("<I", len(dimensions))
        head += b"".join(struct.pack("<Q", one) for one in dimensions) + struct.pack("<IQ", kind, len(body))
        body += raw + b"\0" * (-len(raw) % 32)
    path.write_bytes(head + b"\0" * (-len(head) % 32) + body)
    return values
