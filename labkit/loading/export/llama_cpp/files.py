"""Writes the two files: first what each tensor is, then the tensors one by one, so that memory holds a single one."""

import shutil
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import (
    GGML_QUANT_SIZES,
    MODEL_ARCH,
    MODEL_ARCH_NAMES,
    GGMLQuantizationType,
    GGUFWriter,
    LlamaFileType,
)
from torch import Tensor, nn
from tqdm.auto import tqdm

from labkit.common.errors import LabError
from labkit.loading.export.llama_cpp import blocks
from labkit.loading.export.llama_cpp.models import Model
from labkit.loading.export.llama_cpp.rules import row_length
from labkit.loading.export.llama_cpp.tokens import Words
from labkit.loading.export.parts import module_names, unquantized_tensors
from labkit.models.checkpoint import Checkpoint
from labkit.quantization import QuantizedLinear

FILE_TYPES = {
    "F32": LlamaFileType.ALL_F32,
    "F16": LlamaFileType.MOSTLY_F16,
    "BF16": LlamaFileType.MOSTLY_BF16,
    "Q4_0": LlamaFileType.MOSTLY_Q4_0,
    "Q4_1": LlamaFileType.MOSTLY_Q4_1,
    "Q8_0": LlamaFileType.MOSTLY_Q8_0,
}
PATCHES = "model.visual.patch_embed.proj.weight"  # a 3-D convolution: llama.cpp takes its frames apart
POSITIONS = "model.visual.embeddings.position_embedding.weight"  # resized, which llama.cpp does in fp32


@dataclass(frozen=True)
class Part:
    """One tensor of a file: its type, its shape in bytes, and the function that makes it."""

    name: str
    type: GGMLQuantizationType
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]

    @property
    def bytes(self) -> int:
        return int(np.prod(self.shape))

    @property
    def weights(self) -> int:
        size, count = GGML_QUANT_SIZES[self.type]
        return self.bytes // count * size


@dataclass
class Written:
    """What was written.

    Attributes:
        files: file -> block type -> number of tensors, weights and bytes.
        rounded, groups: asymmetric groups whose offset fp16 rounds, and all of them.
        limits: the fewest and the most tokens of an image, if the model sees.
        endless: tokens that end an answer of the lab's, and for which the file has no place.
    """

    files: dict[str, dict[str, tuple[int, int, int]]] = field(default_factory=dict)
    rounded: int = 0
    groups: int = 0
    limits: tuple[int, int] | None = None
    endless: list[str] = field(default_factory=list)

    def notes(self) -> list[str]:
        """What the reader should know, in sentences."""
        sentences = []
        for file, types in self.files.items():
            weights = sum(count for _, count, _ in types.values())
            size = sum(bytes for _, _, bytes in types.values())
            each = ", ".join(
                f"{tensors} {type} ({8 * bytes / count:.4g} bits)"
                for type, (tensors, count, bytes) in types.items()
            )
            sentences.append(f"{file}: {8 * size / weights:.2f} bits a weight; tensors: {each}.")
        if self.rounded:
            sentences.append(
                f"{self.rounded} of {self.groups} groups have an offset that fp16 rounds, by 0.05 % of it at most; all "
                "other quantized weights are the lab's to the bit."
            )
        if self.endless:
            sentences.append(
                f"The format names three tokens that end an answer; pass as `stop` besides: {', '.join(self.endless)}."
            )
        if self.limits:
            (text, eye), (least, most) = self.files, self.limits
            sentences.append(
                "llama.cpp does not read the image processor's pixel limits, and takes what comes after an empty "
                f"<think></think> for thoughts: `llama-server --model {text} --mmproj {eye} --image-min-tokens {least} "
                f"--image-max-tokens {most} --reasoning-format none`."
            )
        return sentences


def write(
    folder: Path,
    name: str,
    source: Checkpoint,
    model: nn.Module,
    quantized: Collection[str],
    dtype: torch.dtype,
    progress: bool,
) -> Written:
    """Write ``NAME.gguf``, and ``mmproj-NAME.gguf`` for a model that sees. ``quantized``: modules in blocks."""
    described, processor = Model(source.model_type, source.config), source.processor()
    words = Words.of(processor.tokenizer, described.text.vocab_size)
    for path in source.companions():
        if path.match("LICENSE*") or path.match("NOTICE*"):
            shutil.copyfile(path, folder / path.name)
    written = Written()
    text: list[Part] = []
    vision: list[Part] = []
    for tensor, part in _parts(described, model, quantized, dtype, written):
        (vision if described.is_vision(tensor) else text).append(part)
    file = _open(folder / f"{name}.gguf", MODEL_ARCH_NAMES[described.architecture], "model", name, text)
    described.write_text(file)
    written.endless = words.write(file, _ends(model, processor.tokenizer))
    _finish(file, text, written, progress)
    if vision:
        file = _open(
            folder / f"mmproj-{name}.gguf", MODEL_ARCH_NAMES[MODEL_ARCH.MMPROJ], "mmproj", name, vision
        )
        facts = _preprocessor(processor.image_processor)
        area = (described.vision.patch_size * described.vision.spatial_merge_size) ** 2
        written.limits = -(-facts["min_pixels"] // area), facts["max_pixels"] // area
        described.write_vision(file, facts)
        _finish(file, vision, written, progress)
    return written


def check(source: Checkpoint) -> None:
    """Refuse a model that llama.cpp does not read, before its weights are read.

    Raises:
        LabError: the architecture or the tokenizer.
    """
    described = Model(source.model_type, source.config)
    Words.of(source.processor().tokenizer, described.text.vocab_size)


def _parts(
    described: Model, model: nn.Module, quantized: Collection[str], dtype: torch.dtype, written: Written
) -> Iterator[tuple[str, Part]]:
    """The tensors by their names in the model, in its order; a tied head is left to the embedding."""
    for name, attributes in module_names(model):
        module = model.get_submodule(name)
        tensors = unquantized_tensors(module, attributes, dtype, without_weight=name in quantized)
        if name in quantized:
            rounded, groups = blocks.rounded_offsets(module)
            written.rounded, written.groups = written.rounded + rounded, written.groups + groups
            type = blocks.type_of(module)
            rows = module.out_features if isinstance(module, QuantizedLinear) else module.num_embeddings
            shape = rows, blocks.row_bytes(row_length(module), type)
            make = partial(_ordered, described, f"{name}.weight", partial(blocks.quantized, module))
            yield f"{name}.weight", Part(described.written_name(f"{name}.weight"), type, shape, make)
        for attribute, tensor in tensors.items():
            yield from _plain(described, f"{name}.{attribute}", tensor)


def _plain(described: Model, name: str, tensor: Tensor) -> Iterator[tuple[str, Part]]:
    """The parts of a tensor that is not quantized."""
    written = described.written_name(name)
    frames = {written: tensor}
    if name == PATCHES:
        frames = {written: tensor[:, :, 0], f"{written}.1": tensor[:, :, 1]}
    for part, values in frames.items():
        keeps = values.ndim == 2 and name != POSITIONS  # llama.cpp adds and convolves in fp32
        values = values if keeps and values.dtype in blocks.PLAIN else values.float()
        shape = *values.shape[:-1], values.shape[-1] * values.element_size()
        make = partial(_ordered, described, name, partial(blocks.plain, values))
        yield name, Part(part, blocks.PLAIN[values.dtype], shape, make)


def _ordered(described: Model, name: str, make: Callable[[], np.ndarray]) -> np.ndarray:
    """A tensor's bytes with its rows in llama.cpp's order."""
    values = make()
    order = described.row_order(name)
    if order is None:
        return values
    if values.ndim == 1:  # a bias: bytes of fp32 values
        return values.view(np.float32).reshape(-1, len(order))[:, order.numpy()].reshape(-1).view(np.uint8)
    heads = values.reshape(-1, len(order), values.shape[1])
    return heads[:, order.numpy()].reshape(values.shape)


def _open(path: Path, architecture: str, kind: str, name: str, parts: list[Part]) -> GGUFWriter:
    """A file with its general facts and the list of its tensors."""
    file = GGUFWriter(path, architecture)
    file.add_type(kind)
    file.add_name(name)
    file.add_quantization_version(2)
    commonest: Counter[str] = Counter()
    for part in parts:
        commonest[part.type.name] += part.weights
        file.add_tensor_info(part.name, part.shape, np.dtype(np.uint8), part.bytes, part.type)
    file.add_file_type(FILE_TYPES[commonest.most_common(1)[0][0]])
    return file


def _finish(file: GGUFWriter, parts: list[Part], written: Written, progress: bool) -> None:
    """Write facts and tensors, and count them."""
    path = file.path
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_ti_data_to_file()
    types: dict[str, tuple[int, int, int]] = {}
    for part in tqdm(parts, desc=f"Writing {path.name}", unit="tensor", disable=not progress):
        file.write_tensor_data(part.make())
        tensors, weights, bytes = types.get(part.type.name, (0, 0, 0))
        types[part.type.name] = tensors + 1, weights + part.weights, bytes + part.bytes
    file.close()
    written.files[path.name] = dict(sorted(types.items()))


def _ends(model: nn.Module, tokenizer: Any) -> list[int]:
    """The tokens that end an answer."""
    ends = model.generation_config.eos_token_id if model.generation_config is not None else None
    ends = tokenizer.eos_token_id if ends is None else ends
    return ends if isinstance(ends, list) else [] if ends is None else [ends]


def _preprocessor(processor: Any) -> dict[str, Any]:
    """Mean, deviation and pixel limits of the image processor, which counts the pixels of two frames."""
    size = processor.size
    least, most = size["shortest_edge"], size["longest_edge"]
    if not (processor.do_normalize and processor.do_rescale and processor.do_resize):
        raise LabError("gguf cannot express an image processor that leaves out resizing or normalization")
    return {
        "mean": list(processor.image_mean),
        "std": list(processor.image_std),
        "min_pixels": least // processor.temporal_patch_size,
        "max_pixels": most // processor.temporal_patch_size,
    }
