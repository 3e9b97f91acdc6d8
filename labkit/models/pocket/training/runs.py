"""A training run's folder: its log, a model to begin with, weights to go on from."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import Glm4vForConditionalGeneration

from labkit.models.pocket.configuration import PocketConfig
from labkit.models.pocket.glm4v import plain_config
from labkit.models.pocket.modeling import PocketForConditionalGeneration
from labkit.models.pocket.tokenizer import VOCAB_SIZE
from labkit.models.pocket.training.samples import Encoder


class Log:
    """JSON lines to a file and to the screen."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("a", encoding="utf-8")

    def __call__(self, record: dict) -> None:
        line = json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in record.items()})
        self.file.write(line + "\n")
        self.file.flush()
        print(line, flush=True)


def below(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The entries of a state dict whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


CONFIGS = {
    "standard": PocketConfig.standard,
    "tiny": PocketConfig.tiny,
    "glm4v": plain_config,
    "glm4v-tiny": partial(plain_config, tiny=True),
}


def new_model(size: str, tokenizer) -> tuple[Glm4vForConditionalGeneration, Encoder]:
    """A model with random weights for a tokenizer; `size`: one of `CONFIGS`."""
    encoder = Encoder(tokenizer)
    config = CONFIGS[size](encoder.id, VOCAB_SIZE)
    make = (
        PocketForConditionalGeneration if isinstance(config, PocketConfig) else Glm4vForConditionalGeneration
    )
    torch.manual_seed(0)
    return make(config), encoder


def load_state(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Weights of an exported model or a run, and of its training heads where they are there, in float32."""
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise FileNotFoundError(f"no model*.safetensors in {folder}")
    heads = [folder / "heads.safetensors"] if (folder / "heads.safetensors").exists() else []
    return tuple(
        {k: v.float() for file in some for k, v in load_file(file).items()} for some in (files, heads)
    )


def load_init(model: nn.Module, heads: nn.Module, folder: Path) -> None:
    """Weights to go on from; a head that was added since begins anew."""
    state, its_heads = load_state(folder)
    model.load_state_dict(state)
    heads.load_state_dict(its_heads, strict=False)
