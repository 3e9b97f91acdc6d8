"""Prompts and answers as token ids, for a model without a tokenizer.

Used for models with random weights, of which only the cost matters. A Glm4v also takes images: its image
processor needs no files.
"""

from __future__ import annotations

import random
import re
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch

from labkit.common.errors import LabError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Message = Mapping[str, Any]
MEDIA_TOKENS = ("image_token_id", "video_token_id", "audio_token_id")


class IdTokenizer:
    """Replaces a tokenizer: a text is its token ids, written as numbers."""

    chat_template = None
    eos_token_id = None
    pad_token_id = None
    all_special_tokens: tuple[str, ...] = ()
    added_tokens_decoder: Mapping[int, object] = MappingProxyType({})

    def __init__(self, vocabulary: int, media: Collection[int] = ()) -> None:
        self.vocabulary, self.media = vocabulary, frozenset(media)

    def __len__(self) -> int:
        return self.vocabulary

    def get_vocab(self) -> dict[str, int]:
        """Every token as `decode` writes it."""
        return {f"{token} ": token for token in range(self.vocabulary)}

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        """``17 4 250`` for three tokens, with a space after each."""
        return "".join(f"{int(token)} " for token in ids)

    def encode(self, text: str, **_: Any) -> list[int]:
        """The numbers in a text.

        Raises:
            LabError: the text holds anything else, or a number that is no token id.
        """
        if not re.fullmatch(r"[\d\s]*", text):
            raise LabError(
                f"there is no tokenizer here, so a prompt is token ids, such as '17 4 250'; not {text[:40]!r}"
            )
        ids = [int(word) for word in text.split()]
        if wrong := [token for token in ids if token >= self.vocabulary]:
            raise LabError(f"there is no token {wrong[0]}; the model has 0 to {self.vocabulary - 1}")
        if wrong := [token for token in ids if token in self.media]:
            raise LabError(f"the token {wrong[0]} stands for a picture or a sound: give that itself")
        return ids

    def random_text(self, count: int, seed: int = 0) -> str:
        """``count`` token ids drawn with a seed, as text that `encode` reads."""
        draw = random.Random(seed)
        allowed = [token for token in range(self.vocabulary) if token not in self.media]
        return " ".join(str(token) for token in draw.choices(allowed, k=count))


class IdProcessor:
    """Turns messages whose texts are token ids, and images for a Glm4v, into model inputs.

    Args:
        config: the model's configuration.
    """

    takes_ids = True
    missing: Mapping[str, str] = {}

    def __init__(self, config: PreTrainedConfig) -> None:
        self._config = config
        media = [getattr(config, name, None) for name in MEDIA_TOKENS]
        self.tokenizer = IdTokenizer(config.get_text_config(decoder=True).vocab_size, media)
        self.image_processor = None
        if config.model_type == "glm4v":
            from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil

            self.image_processor = Glm4vImageProcessorPil(
                patch_size=config.vision_config.patch_size,
                merge_size=config.vision_config.spatial_merge_size,
                temporal_patch_size=config.vision_config.temporal_patch_size,
            )
        self.modalities = ("image",) if self.image_processor is not None else ()

    def __call__(self, messages: Sequence[Message], enable_thinking: bool = False) -> dict[str, torch.Tensor]:
        """As `labkit.models.processors.TemplateProcessor`, but without a template: the parts follow each other.

        Raises:
            LabError: a text is not made of token ids.
        """
        ids: list[int] = []
        images: list[dict[str, torch.Tensor]] = []
        for message in messages:
            content = message["content"]
            for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
                if part["type"] == "text":
                    ids += self.tokenizer.encode(part["text"])
                    continue
                image = self.image_processor(images=[part["image"]], return_tensors="pt")
                images.append(image)
                count = int(image["image_grid_thw"].prod()) // self.image_processor.merge_size**2
                config = self._config
                ids += [
                    config.image_start_token_id,
                    *[config.image_token_id] * count,
                    config.image_end_token_id,
                ]
        tokens = torch.tensor([ids], dtype=torch.long, device="cpu")
        inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        if images:
            inputs["mm_token_type_ids"] = (tokens == self._config.image_token_id).long()
            for key in ("pixel_values", "image_grid_thw"):
                inputs[key] = torch.cat([image[key] for image in images])
        return inputs
