"""The architectures of llama.cpp that the lab writes: their tensors' names, the order of rows, hyperparameters.

llama.cpp rotates a head's values in pairs (``llama``) or in halves (the others), whereas transformers rotates halves in
Llama and pairs in Glm4v: rows of the query and key projections are reordered for these two.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from gguf import MODEL_ARCH, GGUFWriter, VisionProjectorType, get_tensor_name_map
from torch import Tensor
from transformers import PreTrainedConfig

from labkit.common.errors import LabError

ARCHITECTURES = {
    "glm4v": MODEL_ARCH.GLM4,
    "llama": MODEL_ARCH.LLAMA,
    "qwen2": MODEL_ARCH.QWEN2,
    "qwen3": MODEL_ARCH.QWEN3,
}
SUFFIXES = (".weight", ".bias")
names_of = cache(get_tensor_name_map)


@dataclass(frozen=True)
class Model:
    """A model's configuration as llama.cpp takes it.

    Raises:
        LabError: llama.cpp, or the lab's export for it, has no such model; all reasons at once.
    """

    model_type: str
    config: PreTrainedConfig

    def __post_init__(self) -> None:
        if self.model_type not in ARCHITECTURES:
            raise LabError(
                f"gguf cannot express the architecture {self.model_type}: the lab writes "
                f"{', '.join(ARCHITECTURES)} for llama.cpp; nearest for a phone agent: glm4v, as pocket-glm4v"
            )
        if reasons := list(self._obstacles()):
            raise LabError(f"gguf cannot express this {self.model_type}: {'; '.join(reasons)}")

    @property
    def text(self) -> PreTrainedConfig:
        """The decoder's configuration."""
        return self.config.get_text_config(decoder=True)

    @property
    def vision(self) -> PreTrainedConfig | None:
        """The eye's configuration, if there is an eye."""
        return getattr(self.config, "vision_config", None)

    @property
    def architecture(self) -> MODEL_ARCH:
        """llama.cpp's architecture of the decoder."""
        return ARCHITECTURES[self.model_type]

    @property
    def head_dim(self) -> int:
        """Values of a head."""
        return getattr(self.text, "head_dim", None) or self.text.hidden_size // self.text.num_attention_heads

    @property
    def rotary_dim(self) -> int:
        """Values of a head that are rotated."""
        return int(self.head_dim * self.text.rope_parameters.get("partial_rotary_factor", 1.0))

    def is_vision(self, name: str) -> bool:
        """Whether the tensor ``name`` belongs into the eye's file."""
        return name.startswith("model.visual.")

    def written_name(self, name: str) -> str:
        """llama.cpp's name of a tensor.

        Raises:
            LabError: llama.cpp has no such tensor.
        """
        if self.is_vision(name):
            names = names_of(MODEL_ARCH.MMPROJ, self.vision.depth)
            plain = name.removeprefix("model.")
        else:
            names = names_of(self.architecture, self.text.num_hidden_layers)
            plain = name.replace("model.language_model.", "model.")
        written = names.get_name(plain, try_suffixes=SUFFIXES)
        if written is None:
            raise LabError(f"gguf cannot express the tensor {name}: llama.cpp knows none such")
        return written

    def row_order(self, name: str) -> Tensor | None:
        """The rows of a query or key projection in llama.cpp's order, for one head: [head_dim]; None for others."""
        if not re.search(r"\.[qk]_proj\.", name) or self.is_vision(name):
            return None
        rows = torch.arange(self.head_dim)
        if self.model_type == "llama":  # halves -> pairs
            return rows.view(2, -1).T.flatten()
        if self.model_type == "glm4v":  # pairs -> halves
            rotated, rest = rows[: self.rotary_dim], rows[self.rotary_dim :]
            return torch.cat([rotated[::2], rotated[1::2], rest])
        return None

    def write_text(self, file: GGUFWriter) -> None:
        """The decoder's hyperparameters."""
        text, rope = self.text, self.text.rope_parameters
        file.add_block_count(text.num_hidden_layers)
        file.add_context_length(text.max_position_embeddings)
        file.add_embedding_length(text.hidden_size)
        file.add_feed_forward_length(text.intermediate_size)
        file.add_head_count(text.num_attention_heads)
        file.add_head_count_kv(text.num_key_value_heads)
        file.add_key_length(self.head_dim)
        file.add_value_length(self.head_dim)
        file.add_vocab_size(text.vocab_size)
        file.add_layer_norm_rms_eps(text.rms_norm_eps)
        file.add_rope_freq_base(rope["rope_theta"])
        file.add_rope_dimension_count(self.rotary_dim)
        if sections := rope.get("mrope_section"):
            file.add_rope_dimension_sections([*sections, 0])

    def write_vision(self, file: GGUFWriter, preprocessor: Mapping[str, Any]) -> None:
        """The eye's hyperparameters. ``preprocessor``: mean, deviation and pixel limits of the image processor."""
        vision = self.vision
        file.add_clip_has_vision_encoder(True)
        file.add_clip_projector_type(VisionProjectorType.GLM4V)
        file.add_vision_projection_dim(self.text.hidden_size)
        file.add_vision_image_size(vision.image_size)
        file.add_vision_patch_size(vision.patch_size)
        file.add_vision_embedding_length(vision.hidden_size)
        file.add_vision_feed_forward_length(vision.out_hidden_size)
        file.add_vision_block_count(vision.depth)
        file.add_vision_head_count(vision.num_heads)
        file.add_vision_attention_layernorm_eps(vision.rms_norm_eps)
        file.add_vision_spatial_merge_size(vision.spatial_merge_size)
        file.add_vision_use_silu(True)
        file.add_vision_image_mean(preprocessor["mean"])
        file.add_vision_image_std(preprocessor["std"])
        file.add_vision_min_pixels(preprocessor["min_pixels"])
        file.add_vision_max_pixels(preprocessor["max_pixels"])

    def _obstacles(self) -> list[str]:
        """What llama.cpp's graph of this architecture does not do, in words."""
        text, vision = self.text, self.vision
        rope = text.rope_parameters.get("rope_type", "default")
        found = {
            f"rope_type {rope}; nearest: default": rope != "default",
            f"hidden_act {text.hidden_act}; nearest: silu": text.hidden_act != "silu",
            "sliding windows; nearest: use_sliding_window: false": getattr(text, "use_sliding_window", False),
        }
        if vision is not None:
            theta = vision.rope_parameters["rope_theta"]
            found |= {
                f"the eye's hidden_act {vision.hidden_act}; nearest: silu": vision.hidden_act != "silu",
                f"the eye's rope_theta {theta}; nearest: 10000": theta != 10000,
                f"patches of {vision.temporal_patch_size} frames; nearest: 2": vision.temporal_patch_size
                != 2,
                f"spatial_merge_size {vision.spatial_merge_size}; nearest: 2": vision.spatial_merge_size != 2,
            }
        return [reason for reason, holds in found.items() if holds]
