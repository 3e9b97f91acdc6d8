"""Folders with tiny models, plans that use every scheme, and what two engines must agree on."""

import numpy as np
import tiny_models
import torch
from PIL import Image

from labkit.plans.plan import QuantizationPlan

HELLO = [{"role": "user", "content": "hello"}]
PLANS = {
    **{name: QuantizationPlan.preset(name) for name in ("fp32", "fp16", "bf16", "int8", "int8-dynamic")},
    **{name: QuantizationPlan.preset(name) for name in ("nf4", "llm-int8")},
    **{f"int{bits}": QuantizationPlan.uniform("int4", num_bits=bits) for bits in (2, 3, 4, 8)},
    "hqq": QuantizationPlan.uniform("hqq", num_bits=3),
    "hqq-4bit": QuantizationPlan.uniform("hqq"),
    "gptq": QuantizationPlan.preset("gptq"),
    "awq": QuantizationPlan.uniform("awq", num_bits=8, symmetric=True),
    "calibrated": QuantizationPlan.from_dict(
        {
            "name": "calibrated",
            "rules": [
                {"role": "decoder", "linear": "down_proj", "scheme": "awq"},
                {"role": "decoder", "scheme": "gptq", "num_bits": 3},
                {"role": "vision", "scheme": "int8-dynamic", "smoothing": "rms", "optional": True},
                {
                    "role": ["speech", "projector"],
                    "scheme": "hqq",
                    "optional": True,
                    "on_unsupported": "int8",
                },
                {"role": "embedding", "modules": "embedding", "scheme": "int8", "optional": True},
                {
                    "role": ["vision", "speech", "projector"],
                    "modules": "conv",
                    "scheme": "int8",
                    "optional": True,
                },
            ],
        }
    ),
    "nf4-plain": QuantizationPlan.uniform("nf4", double_quant=False, default="fp32"),
    "parts": QuantizationPlan.from_dict(
        {
            "name": "parts",
            "rules": [
                {"role": "decoder", "scheme": "int4", "num_bits": 3},
                {"role": "vision", "scheme": "int8-dynamic", "optional": True},
                {"role": "speech", "scheme": "nf4", "optional": True, "on_unsupported": "int8"},
                {"role": "cross_modal", "scheme": "fp16", "optional": True},
                {"role": "projector", "scheme": "llm-int8", "optional": True},
            ],
        }
    ),
    "mixed": QuantizationPlan.from_dict(
        {
            "name": "mixed",
            "rules": [
                {"match": "re:.*mlp.down_proj", "scheme": "int4", "num_bits": 3},
                {"match": "re:.*mlp.*", "scheme": "int4", "symmetric": True},
                {"match": "re:.*q_proj", "scheme": "nf4"},
                {"match": "re:.*k_proj", "scheme": "llm-int8", "outlier_threshold": 3.5},
                {"match": "re:.*v_proj", "scheme": "int8-dynamic"},
                {"match": "re:.*layers.0.*", "scheme": "fp32"},
                {"match": "re:.*", "scheme": "int8"},
            ],
            "default": "fp16",
            "runtime": {"sliding_window": 64},
        }
    ),
}


def calibration_for(which):
    """For a model of these: two of PhoneTap's items, or tokens for one that sees no screens."""
    return [torch.arange(3, 67)[None]] if which == "llama" else 2


def save_llama(folder, **changes):
    """A tiny Llama in bf16; ``changes`` go into its configuration."""
    from transformers import LlamaForCausalLM

    config = tiny_models.llama_config()
    for name, value in changes.items():
        setattr(config, name, value)
    model = tiny_models.random_model(LlamaForCausalLM, config)
    model.to(torch.bfloat16).save_pretrained(folder)
    tiny_models.tokenizer().save_pretrained(folder)
    return folder


def save_glm4v(folder):
    tiny_models.glm4v().to(torch.bfloat16).save_pretrained(folder)
    tiny_models.tokenizer().save_pretrained(folder)
    tiny_models.image_processor().save_pretrained(folder)
    return folder


def save_pocket(folder):
    model, processor = tiny_models.pocket()
    model.to(torch.bfloat16).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def picture(seed=0):
    pixels = np.random.default_rng(seed).integers(0, 255, (168, 112, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def question(engine):
    """A conversation with all that the engine's model takes."""
    parts = [{"type": "text", "text": "where?"}]
    if "audio" in engine.modalities:
        voice = np.random.default_rng(0).normal(size=8000).astype(np.float32) * 0.1
        parts.insert(0, {"type": "audio", "audio": voice})
    if "image" in engine.modalities:
        parts.insert(0, {"type": "image", "image": picture()})
    return [{"role": "user", "content": parts}]


def logits(engine, messages=None):
    """[L, vocabulary] of a prompt."""
    inputs = engine.prepare(messages or question(engine))
    with torch.inference_mode():
        return engine.model(**inputs).logits[0]
