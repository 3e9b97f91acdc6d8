"""From messages to the pocket model's tensors: text, screenshots and recordings, without torchvision."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil

from labkit.models.pocket.configuration import PocketConfig
from labkit.models.pocket.modeling import speech_tokens
from labkit.models.pocket.tokenizer import SPECIAL_TOKENS

SAMPLE_RATE = 16_000
MAX_PIXELS = 224 * 476
MIN_PIXELS = 112 * 112
TEMPORAL = 2  # frames in a patch of the vision encoder; a still image is repeated


class PocketProcessor:
    """Tokenizer, image processor (Pillow) and recording normalization in one call.

    `processor(messages, enable_thinking=False)` takes one conversation (see labkit.common.actions) and returns
    input_ids, attention_mask and mm_token_type_ids [1, L]; with images pixel_values [patches, 1176] and
    image_grid_thw [n, 3]; with recordings input_features [n, samples] and audio_lengths [n].
    """

    marks_prompt = True  # the model needs `prompt_mask` if the answer follows the prompt in the same call

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, config: PocketConfig, image_processor=None
    ) -> None:
        self.tokenizer = tokenizer
        self.config = config
        self.image_processor = image_processor or Glm4vImageProcessorPil(
            size={"shortest_edge": TEMPORAL * MIN_PIXELS, "longest_edge": TEMPORAL * MAX_PIXELS}
        )
        self._ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> PocketProcessor:
        """Loads the files that `save_pretrained` writes."""
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        images = Glm4vImageProcessorPil.from_pretrained(folder)
        return cls(tokenizer, PocketConfig.from_pretrained(folder), images)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes tokenizer, chat template and image settings beside the model's weights."""
        self.tokenizer.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)
        settings = Path(folder) / "preprocessor_config.json"
        written = json.loads(settings.read_text()) if settings.exists() else {}
        settings.write_text(json.dumps(written | {"sampling_rate": SAMPLE_RATE}, indent=2) + "\n")

    def __call__(self, messages: Sequence[dict], enable_thinking: bool = False) -> dict[str, torch.Tensor]:
        images, recordings, texts = [], [], []
        plain = []
        for message in messages:
            content = message["content"]
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            plain_parts = []
            for part in parts:
                if part["type"] == "image":
                    images.append(part["image"].convert("RGB"))
                elif part["type"] == "audio":
                    recordings.append(normalize_recording(part["audio"]))
                elif part["type"] == "text":
                    texts.append(part["text"])
                    part = {"type": "text", "text": f"\x00{len(texts) - 1}\x00"}
                else:
                    raise ValueError(f"unknown content part {part['type']!r}; known: text, image, audio")
                plain_parts.append(part)
            plain.append({"role": message["role"], "content": plain_parts})
        features = self._image_features(images)
        rendered = self.tokenizer.apply_chat_template(
            _without_lists_for_assistants(plain), tokenize=False, add_generation_prompt=True,
            enable_thinking=enable_thinking,
        )  # fmt: skip
        ids = self._encode(
            rendered, texts, features.get("image_grid_thw"), [len(samples) for samples in recordings]
        )
        input_ids = torch.tensor([ids], dtype=torch.long, device="cpu")
        batch = {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "mm_token_type_ids": (input_ids == self._ids["<|image|>"]).int(),
            **features,
        }
        if recordings:
            lengths = torch.tensor([len(recording) for recording in recordings], device="cpu")
            padded = torch.zeros(len(recordings), int(lengths.max()), dtype=torch.float32, device="cpu")
            for row, recording in zip(padded, recordings):
                row[: len(recording)] = torch.from_numpy(recording)
            batch |= {"input_features": padded, "audio_lengths": lengths}
        return batch

    def _image_features(self, images: list) -> dict[str, torch.Tensor]:
        if not images:
            return {}
        features = [self.image_processor([image], return_tensors="pt") for image in images]
        names = ("pixel_values", "image_grid_thw")
        return {name: torch.cat([feature[name] for feature in features]) for name in names}

    def _encode(self, rendered: str, texts: list[str], grids, samples: list[int]) -> list[int]:
        """Token ids; special tokens in the messages' texts are encoded letter by letter."""
        grid_rows, sample_rows = iter(grids if grids is not None else ()), iter(samples)
        ids: list[int] = []
        for position, piece in enumerate(rendered.split("\x00")):
            if position % 2:
                ids += self.tokenizer.encode(
                    texts[int(piece)], add_special_tokens=False, split_special_tokens=True
                )
                continue
            for token in self.tokenizer.encode(piece, add_special_tokens=False):
                if token == self._ids["<|image|>"]:
                    ids += [token] * (int(next(grid_rows).prod()) // self.image_processor.merge_size**2)
                elif token == self._ids["<|audio|>"]:
                    ids += [token] * speech_tokens(next(sample_rows), self.config)
                else:
                    ids.append(token)
        return ids


def _without_lists_for_assistants(messages: list[dict]) -> list[dict]:
    """Messages with each assistant's text parts joined: the template writes an assistant's content unchanged."""
    return [
        {**message, "content": "".join(part["text"] for part in message["content"] if part["type"] == "text")}
        if message["role"] == "assistant"
        else message
        for message in messages
    ]


def normalize_recording(samples: np.ndarray) -> np.ndarray:
    """Zero mean and unit variance, as Wav2Vec2's feature extractor does: float32 [samples]."""
    samples = np.asarray(samples, dtype=np.float32)
    return (samples - samples.mean()) / np.sqrt(samples.var() + 1e-7)
