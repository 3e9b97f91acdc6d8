"""Model specs: short name, source of weights and processor, description.

Four are registered; every transformers checkpoint on the hub or in a local folder has a spec too.
Nothing here imports torch, so listing models is quick.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from labkit.common.errors import LabError
from labkit.common.files import assets_folder, user_path

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


GLM_4_1V_9B = {
    "model_type": "glm4v",
    "architectures": ["Glm4vForConditionalGeneration"],
    "text_config": {
        "vocab_size": 151552,
        "hidden_size": 4096,
        "intermediate_size": 13696,
        "num_hidden_layers": 40,
        "num_attention_heads": 32,
        "num_key_value_heads": 2,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
            "mrope_section": [8, 12, 12],
        },
    },
    "vision_config": {
        "depth": 24,
        "hidden_size": 1536,
        "num_heads": 12,
        "out_hidden_size": 4096,
        "intermediate_size": 13696,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
}
"""The configuration of GLM-4.1V-9B, which both AutoGLM-Phone models share."""


@dataclass(frozen=True)
class ModelSpec:
    """A model's name and source.

    Attributes:
        name: the name that users type and that measurements carry.
        source: a local folder with a transformers checkpoint, or a hub id ``owner/name``.
        description: a line of text.
        parameters: number of parameters, if known without reading files.
        published: its published configuration, to compute sizes where the hub cannot be reached.
    """

    name: str
    source: str
    description: str = ""
    parameters: int | None = None
    published: Mapping[str, Any] | None = field(default=None, repr=False, compare=False)

    @property
    def folder(self) -> Path | None:
        """The local folder, or None for a model on the hub."""
        path = user_path(self.source)
        return path if path.is_dir() else None

    @property
    def is_quantized(self) -> bool:
        """Whether it is a folder that the lab quantized (`labkit.loading`), which contains its plan."""
        return self.folder is not None and (self.folder / "labkit.json").is_file()

    def availability(self) -> str:
        """Where the weights are now: ``here``, ``downloaded``, ``on the hub`` or ``missing``."""
        if self.folder is not None:
            return "here" if any(self.folder.glob("*.safetensors")) else "missing"
        if not HUB_ID.fullmatch(self.source):
            return "missing"
        try:
            from huggingface_hub import try_to_load_from_cache

            cached = [
                try_to_load_from_cache(self.source, name)
                for name in ("model.safetensors", "model.safetensors.index.json")
            ]
        except ImportError:
            return "on the hub"
        return "downloaded" if any(isinstance(path, str) for path in cached) else "on the hub"


def _registered() -> tuple[ModelSpec, ...]:
    return (
        ModelSpec(
            "pocket",
            str(assets_folder() / "pocket"),
            "a pocket-size phone agent with vision, speech, cross-modal attention and a GLM decoder; shipped",
            _count_from_index(assets_folder() / "pocket"),
        ),
        ModelSpec(
            "pocket-glm4v",
            str(assets_folder() / "pocket-glm4v"),
            "a phone agent of transformers' plain Glm4v class, for typed requests; other engines load it too; shipped",
            _count_from_index(assets_folder() / "pocket-glm4v"),
        ),
        ModelSpec(
            "autoglm-phone-9b",
            "zai-org/AutoGLM-Phone-9B",
            "AutoGLM-Phone for Chinese apps: Glm4v, 10.3 B parameters, 20.6 GB in BF16",
            10_293_000_000,
            GLM_4_1V_9B,
        ),
        ModelSpec(
            "autoglm-phone-9b-multilingual",
            "zai-org/AutoGLM-Phone-9B-Multilingual",
            "AutoGLM-Phone for English and other apps: Glm4v, 10.3 B parameters, 20.6 GB in BF16",
            10_293_000_000,
            GLM_4_1V_9B,
        ),
    )


def _count_from_index(folder: Path) -> int | None:
    """Number of parameters, from the headers of a folder's safetensors files; None without readable files."""
    total = 0
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with path.open("rb") as file:
                header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        except (OSError, ValueError, MemoryError, OverflowError):
            return None
        for name, tensor in header.items():
            if name != "__metadata__":
                size = 1
                for length in tensor["shape"]:
                    size *= length
                total += size
    return total or None


def list_models() -> list[ModelSpec]:
    """The registered models, the shipped model first."""
    return list(_registered())


def get_spec(model: str | Path | ModelSpec) -> ModelSpec:
    """The spec for a registered name, a local folder, or a hub id ``owner/name``.

    Raises:
        LabError: the model is none of these; the message lists the known names and the nearest.
    """
    if isinstance(model, ModelSpec):
        return model
    text = str(model)
    registered = {spec.name: spec for spec in _registered()}
    if text in registered:
        return registered[text]
    path = user_path(text)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise LabError(f"the folder {text} has no config.json, so it is no transformers checkpoint")
        return ModelSpec(path.resolve().name, str(path.resolve()), f"the checkpoint in {text}")
    if path.exists():
        raise LabError(f"{text} is a file; a model is a name, a folder with config.json, or a hub id")
    looks_like_path = isinstance(model, Path) or text.startswith(("/", ".", "~")) or "\\" in text
    if not looks_like_path and HUB_ID.fullmatch(text):
        return ModelSpec(text, text, f"{text} on the Hugging Face hub")
    near = difflib.get_close_matches(text, registered, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    problem = f"the folder {text} does not exist" if looks_like_path else f"no model is called {text!r}"
    raise LabError(
        f"{problem}.{hint} Known models: {', '.join(registered)}; or give a local folder with a transformers "
        "checkpoint, or a hub id such as owner/name"
    )
