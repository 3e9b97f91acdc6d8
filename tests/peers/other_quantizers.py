"""What `compare_quantizers.py` asks of each library: the model quantized, as plain numbers.

Every ``run_…`` takes the options of the command line and the token ids that calibrate, and yields each Linear's weight as
the library means it, and whatever else it may have changed. The libraries are imported where they are used: each has an
environment of its own.
"""

from __future__ import annotations

import json
import os
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

SCALE_BITS = 16
Found = Iterator[tuple[str, Tensor, Tensor, int, int] | tuple[str, Tensor]]
"""Of each Linear: its name, weight [N, K] as the library means it, scale [N, K/G], bits of a code and of a zero point.
Of other parameters, if the library may change them: name and value."""


def linears_of(model: nn.Module) -> dict[str, nn.Linear]:
    """The Linears that are quantized: all but the head, which shares the embedding's weight."""
    named = model.named_modules()
    return {name: one for name, one in named if isinstance(one, nn.Linear) and not name.endswith("lm_head")}


def others_of(model: nn.Module) -> dict[str, Tensor]:
    """The other parameters, as norms and biases: all but the head's and what a library hangs on its Linears."""
    named = {name: one.data for name, one in model.named_parameters() if not name.endswith("lm_head.weight")}
    linears = linears_of(model)
    return {
        name: one
        for name, one in named.items()
        if name.endswith(".bias") or name.rpartition(".")[0] not in linears
    }


def read_model(folder: Path) -> nn.Module:
    """The unquantized model, fp32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def llm_compressor_groups(options: Namespace, **more: Any) -> dict[str, Any]:
    """What llm-compressor's modifiers have to be told: which Linears, and on what grid."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    weights = QuantizationArgs(
        num_bits=options.bits,
        type="int",
        strategy="group",
        group_size=options.group_size,
        symmetric=options.symmetric,
        observer=options.observer,
        **more,
    )
    groups = {"all": QuantizationScheme(targets=["Linear"], weights=weights)}
    return {"ignore": ["lm_head"], "config_groups": groups}


def apply_llm_compressor(options: Namespace, ids: list[list[int]], recipe: Any) -> Found:
    """A recipe of llm-compressor's, calibrated if there are token ids."""
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from datasets import Dataset
    from llmcompressor import oneshot

    calibration = {}
    if ids:
        calibration = {
            "dataset": Dataset.from_dict(
                {"input_ids": ids, "attention_mask": [[1] * len(one) for one in ids]}
            ),
            "max_seq_length": len(ids[0]),
            "num_calibration_samples": len(ids),
        }
    model = read_model(options.model)
    oneshot(model=model, recipe=recipe, **calibration)
    for name, linear in linears_of(model).items():
        scale, zero = linear.weight_scale, getattr(linear, "weight_zero_point", None)
        weight = fake_quantize(linear.weight, scale, zero, linear.quantization_scheme.weights)
        yield name, weight, scale, options.bits, 0 if options.symmetric else options.bits
    yield from others_of(model).items()


def run_llm_compressor(options: Namespace, ids: list[list[int]]) -> Found:
    """GPTQ, columns by falling activation with static groups; each layer calibrated on those before it."""
    from llmcompressor.modifiers.quantization import GPTQModifier

    groups = llm_compressor_groups(options, actorder="weight")
    yield from apply_llm_compressor(options, ids, GPTQModifier(**groups))


def run_llm_compressor_awq(options: Namespace, ids: list[list[int]]) -> Found:
    """AWQ with its default pairs of layers: norms and some Linears take the scales of the columns that follow them."""
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.pipelines.cache import IntermediatesCache

    if not torch.accelerator.is_available():  # 0.14 pins memory for one, and stops
        IntermediatesCache.pin_memory = lambda *_: None
    recipe = [AWQModifier(), QuantizationModifier(**llm_compressor_groups(options))]
    yield from apply_llm_compressor(options, ids, recipe)


def run_llm_compressor_rtn(options: Namespace, ids: list[list[int]]) -> Found:
    """Rounding to the nearest, without calibration."""
    from llmcompressor.modifiers.quantization import QuantizationModifier

    yield from apply_llm_compressor(options, [], QuantizationModifier(**llm_compressor_groups(options)))


def run_gptqmodel(options: Namespace, ids: list[list[int]]) -> Found:
    """GPTQ with the library's own defaults, but for bits, groups, symmetry and, with --act-order, the order of columns."""
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # it does not start with the one of a small machine
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    order = {"desc_act": True, "static_groups": True, "act_group_aware": False} if options.act_order else {}
    config = QuantizeConfig(
        bits=options.bits,
        group_size=options.group_size,
        sym=options.symmetric,
        device="cpu",
        format="gptq_v2",  # the default's zero points are one less than meant once it is packed
        offload_to_disk=False,
        **order,
    )
    wrapped = GPTQModel.load(str(options.model), config, dtype=torch.float32)
    samples = [{"input_ids": one, "attention_mask": [1] * len(one)} for one in ids]
    wrapped.quantize(samples, batch_size=1, backend=BACKEND.TORCH)
    for name, module in wrapped.model.named_modules():
        if hasattr(module, "dequantize_weight"):
            yield (
                name,
                module.dequantize_weight().T,
                module.scales.T,
                options.bits,
                0 if options.symmetric else options.bits,
            )


def run_auto_round(options: Namespace, ids: list[list[int]]) -> Found:
    """Rounding tuned by signed gradients; with --average AutoScheme chooses 3, 4 or 8 bits for each Linear before.
    8 bits are always symmetric there, and sequences that repeat one token are left out."""
    from auto_round import AutoRound, AutoScheme
    from auto_round.schemes import QuantizationScheme
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    texts = [tokenizer.decode(one) for one in ids]
    if [tokenizer.encode(one, add_special_tokens=False) for one in texts] != ids:
        raise SystemExit("the library reads text, and this text does not become the same tokens again")
    dataset = options.peers / "auto-round.json"
    dataset.write_text(json.dumps([{"text": one} for one in texts]), encoding="utf-8")
    amounts = {"seqlen": len(ids[0]), "batch_size": 4, "dataset": str(dataset), "enable_torch_compile": False}

    def scheme(bits: int) -> QuantizationScheme:
        return QuantizationScheme(
            bits=bits,
            group_size=options.group_size,
            sym=options.symmetric,
            data_type="int",
            act_bits=16,
        )

    chosen = scheme(options.bits)
    if options.average:
        chosen = AutoScheme(
            options.average, [scheme(bits) for bits in (3, 4, 8)], nsamples=options.scored, **amounts
        )
    taken = {}
    if options.like:
        layers = json.loads((options.peers / options.like / "peer.json").read_text(encoding="utf-8"))[
            "layers"
        ]
        taken = {"layer_config": {name: {"bits": bits} for name, bits in layers.items()}}
    # amp=False: tuned in fp32, as the model is kept
    tuner = AutoRound(
        read_model(options.model),
        tokenizer,
        scheme=chosen,
        iters=options.iters,
        nsamples=len(ids),
        amp=False,
        device_map="cpu",
        **amounts,
        **taken,
    )
    model, _ = tuner.quantize()
    for name, linear in linears_of(model).items():
        yield name, linear.weight, linear.scale, linear.bits, 0 if linear.sym else linear.bits


def run_hqq(options: Namespace, ids: list[list[int]]) -> Found:
    """Half-quadratic quantization, without calibration; its zero points are real numbers."""
    from hqq.core.quantize import Quantizer

    for name, linear in linears_of(read_model(options.model)).items():
        codes, facts = Quantizer.quantize(
            linear.weight.data,
            nbits=options.bits,
            group_size=options.group_size,
            axis=1,
            optimize=True,
            bitpack=False,
            compute_dtype=torch.float32,
            device="cpu",
        )
        weight = ((codes.float() - facts["zero"]) * facts["scale"]).reshape(linear.weight.shape)
        yield name, weight, facts["scale"].reshape(len(weight), -1), options.bits, SCALE_BITS


GRID = ("bits", "group_size")
LIBRARIES = {
    "llm-compressor": ("llmcompressor", run_llm_compressor, (*GRID, "symmetric", "observer")),
    "llm-compressor-awq": ("llmcompressor", run_llm_compressor_awq, (*GRID, "symmetric", "observer")),
    "llm-compressor-rtn": ("llmcompressor", run_llm_compressor_rtn, (*GRID, "symmetric", "observer")),
    "gptqmodel": ("gptqmodel", run_gptqmodel, (*GRID, "symmetric", "act_order")),
    "auto-round": (
        "auto-round",
        run_auto_round,
        (*GRID, "symmetric", "iters", "average", "scored", "like"),
    ),
    "hqq": ("hqq", run_hqq, GRID),
}
"""The package, what runs it, and the options that it heeds."""
