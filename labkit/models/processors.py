"""From messages to model inputs.  Every processor here is called the same way and needs no torchvision:

``processor(messages, enable_thinking=False) -> {"input_ids": [1, L], "attention_mask": [1, L], ...}``

with messages as :func:`labkit.common.messages.normalise_messages` gives them, and has a ``tokenizer``; it may have
``modalities`` (what it takes besides text, if not all that its family does) and ``missing`` (why not).
The pocket model's own processor is called so too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from labkit.common.errors import LabError

Message = Mapping[str, Any]
MARK = "\x00"
"""Stands in a templated prompt around the number of a text that holds control tokens."""


class TemplateProcessor:
    """A tokenizer's chat template, with images for the Glm4v family; alone for text-only models.

    A tokenizer without a chat template gets the plain text of the messages, as a base model expects it.

    Args:
        tokenizer: a transformers tokenizer.
        image_processor: a ``Glm4vImageProcessorPil``, or None for a text-only model.
        image_token: the placeholder that its template writes for one image.
        missing: ``{modality: reason}`` for what the model could take, but this processor cannot.
    """

    def __init__(
        self,
        tokenizer: Any,
        image_processor: Any = None,
        image_token: str = "<|image|>",
        missing: Mapping[str, str] | None = None,
    ):
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.image_token = image_token
        self.modalities = ("image",) if image_processor is not None else ()
        self.missing = dict(missing or {})

    def __call__(self, messages: Sequence[Message], enable_thinking: bool = False) -> dict[str, torch.Tensor]:
        """Inputs for one conversation.

        Returns:
            ``input_ids, attention_mask [1, L]``; with images also ``mm_token_type_ids [1, L]`` (1 = image),
            ``pixel_values [patches, channels * temporal * patch * patch]`` and ``image_grid_thw [images, 3]``

        Control tokens that stand in a text, ``<|user|>`` say, are encoded as the letters they are.

        Raises:
            LabError: the template refuses the messages.
        """
        messages, hostile = self._without_control_tokens(messages)
        images = [
            part["image"] for message in messages for part in _parts(message) if part["type"] == "image"
        ]
        templated = self.tokenizer.chat_template is not None
        text = self._template(messages, enable_thinking) if templated else plain_text(messages)
        media = {}
        if images:
            pixels = self.image_processor(images=images, return_tensors="pt")
            media = {key: pixels[key] for key in ("pixel_values", "image_grid_thw")}
            per_token = self.image_processor.merge_size**2
            counts = [int(grid.prod()) // per_token for grid in media["image_grid_thw"]]
            text = self._expand(text, counts)
        ids = self._encode(text, hostile, not templated)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if images:
            image_id = self.tokenizer.convert_tokens_to_ids(self.image_token)
            inputs["mm_token_type_ids"] = (inputs["input_ids"] == image_id).long()
        return inputs | media

    def _without_control_tokens(self, messages: Sequence[Message]) -> tuple[list[Message], list[str]]:
        """Messages whose texts with control tokens are marks for now, and those texts."""
        control = [str(token) for token in self.tokenizer.all_special_tokens]
        control += [token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        hostile: list[str] = []

        def safe(text: str) -> str:
            if MARK not in text and not any(token in text for token in control):
                return text
            hostile.append(text)
            return f"{MARK}{len(hostile) - 1}{MARK}"

        made = [
            {
                **message,
                "content": safe(message["content"])
                if isinstance(message["content"], str)
                else [
                    {**part, "text": safe(part["text"])} if part["type"] == "text" else part
                    for part in message["content"]
                ],
            }
            for message in messages
        ]
        return made, hostile

    def _encode(self, text: str, hostile: Sequence[str], add_special_tokens: bool) -> torch.Tensor:
        """Token ids ``[1, L]``, hostile texts in their places letter by letter."""
        if not hostile:
            found = self.tokenizer(text, add_special_tokens=add_special_tokens, return_tensors="pt")
            return found["input_ids"].long()
        ids: list[int] = []
        for place, piece in enumerate(text.split(MARK)):
            letters = place % 2 == 1
            ids += self.tokenizer.encode(
                hostile[int(piece)] if letters else piece,
                add_special_tokens=add_special_tokens and place == 0,
                split_special_tokens=letters,
            )
        return torch.tensor([ids], dtype=torch.long)

    def _template(self, messages: Sequence[Message], enable_thinking: bool) -> str:
        stripped = [
            {
                "role": message["role"],
                "content": [
                    {"type": "image"} if part["type"] == "image" else {"type": "text", "text": part["text"]}
                    for part in _parts(message)
                ]
                if any(part["type"] == "image" for part in _parts(message))
                else plain_text([message]),
            }
            for message in messages
        ]
        try:
            return self.tokenizer.apply_chat_template(
                stripped, tokenize=False, add_generation_prompt=True, enable_thinking=enable_thinking
            )
        except Exception as error:  # jinja's own errors and raise_exception() in templates
            raise LabError(f"the model's chat template refuses these messages: {error}") from None

    def _expand(self, text: str, counts: Sequence[int]) -> str:
        """Replace the n-th placeholder by as many as the n-th image has tokens."""
        pieces = text.split(self.image_token)
        if len(pieces) != len(counts) + 1:
            raise LabError(
                f"the model's chat template made {len(pieces) - 1} image placeholders of {len(counts)} images"
            )
        return pieces[0] + "".join(
            self.image_token * count + piece for count, piece in zip(counts, pieces[1:])
        )


class AutoProcessorAdapter:
    """transformers' own processor of another family (GlmAsr, Gemma3n, ...), called as ours are.

    Args:
        processor: what ``AutoProcessor.from_pretrained`` gave.
        modalities: what the family takes besides text.
        dtype: floating inputs (pixels, spectrograms) are cast to it, as these models expect.
    """

    def __init__(self, processor: Any, modalities: Sequence[str], dtype: torch.dtype = torch.float32):
        self._processor = processor
        self.tokenizer = processor.tokenizer
        self.modalities = tuple(modalities)
        self.missing: dict[str, str] = {}
        self.dtype = dtype

    def __call__(self, messages: Sequence[Message], enable_thinking: bool = False) -> dict[str, torch.Tensor]:
        """Inputs for one conversation, as the family's processor names them.

        Raises:
            LabError: the processor or its template refuses the messages.
        """
        conversation = [{"role": message["role"], "content": _parts(message)} for message in messages]
        knows_thinking = "enable_thinking" in str(self._processor.chat_template)
        try:
            encoded = self._processor.apply_chat_template(
                conversation,
                tokenize=True,
                add_generation_prompt=True,
                return_dict=True,
                return_tensors="pt",
                **({"enable_thinking": enable_thinking} if knows_thinking else {}),
            )
        except Exception as error:
            raise LabError(f"the model's processor refuses these messages: {error}") from error
        tensors = {key: value for key, value in encoded.items() if isinstance(value, torch.Tensor)}
        return {
            key: value.to(self.dtype) if value.is_floating_point() else value
            for key, value in tensors.items()
        }


def plain_text(messages: Sequence[Message]) -> str:
    """The text parts of messages, one paragraph a message."""
    paragraphs = [
        "\n".join(part["text"] for part in _parts(message) if part["type"] == "text") for message in messages
    ]
    return "\n\n".join(paragraphs)


def _parts(message: Message) -> list[Mapping[str, Any]]:
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
