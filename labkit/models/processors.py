"""Processors turn messages into model inputs.  All are called the same way and need no torchvision:

``processor(messages, enable_thinking=False) -> {"input_ids": [1, L], "attention_mask": [1, L], ...}``

Messages are those of :func:`labkit.common.messages.normalise_messages`. A processor has a ``tokenizer``; it may have
``modalities`` (what it takes besides text, where that is less than its family takes) and ``missing`` (the reasons).
The pocket model's own processor has the same interface.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch

from labkit.common.errors import LabError
from labkit.models.families import Family
from labkit.models.hub import _first_line

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase, ProcessorMixin
    from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil

logger = logging.getLogger(__name__)

Message = Mapping[str, Any]
MARK = "\x00"
"""Encloses, in a templated prompt, the number of a text that holds control tokens."""


class Processor(Protocol):
    """What every processor has."""

    tokenizer: PreTrainedTokenizerBase

    def __call__(
        self, messages: Sequence[Message], enable_thinking: bool = False
    ) -> dict[str, torch.Tensor]: ...


class TemplateProcessor:
    """A tokenizer's chat template, with images for the Glm4v family; alone for text-only models.

    A tokenizer without a chat template gets the plain text of the messages, as a base model expects it.

    Args:
        tokenizer: a transformers tokenizer.
        image_processor: a ``Glm4vImageProcessorPil``, or None for a text-only model.
        image_token: the placeholder that its template writes for each image.
        missing: ``{modality: reason}`` for what the model could take, but this processor cannot.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        image_processor: Glm4vImageProcessorPil | None = None,
        image_token: str = "<|image|>",
        missing: Mapping[str, str] | None = None,
    ):
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.image_token = image_token
        self.modalities = ("image",) if image_processor is not None else ()
        self.missing = dict(missing or {})

    def __call__(self, messages: Sequence[Message], enable_thinking: bool = False) -> dict[str, torch.Tensor]:
        """Inputs for a conversation.

        Returns:
            ``input_ids, attention_mask [1, L]``; with images also ``mm_token_type_ids [1, L]`` (1 = image),
            ``pixel_values [patches, channels * temporal * patch * patch]`` and ``image_grid_thw [images, 3]``

        Control tokens within a text, such as ``<|user|>``, are encoded letter by letter.

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
        """The messages, with marks in place of texts that hold control tokens, and these texts."""
        control = [str(token) for token in self.tokenizer.all_special_tokens]
        control += [token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        hostile: list[str] = []

        def safe(text: str) -> str:
            if MARK not in text and not any(token in text for token in control):
                return text
            hostile.append(text)
            return f"{MARK}{len(hostile) - 1}{MARK}"

        marked = [
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
        return marked, hostile

    def _encode(self, text: str, hostile: Sequence[str], add_special_tokens: bool) -> torch.Tensor:
        """Token ids ``[1, L]``, with each mark replaced by its hostile text, encoded letter by letter."""
        if not hostile:
            encoded = self.tokenizer(text, add_special_tokens=add_special_tokens, return_tensors="pt")
            return encoded["input_ids"].long()
        ids: list[int] = []
        for place, piece in enumerate(text.split(MARK)):
            letters = place % 2 == 1
            ids += self.tokenizer.encode(
                hostile[int(piece)] if letters else piece,
                add_special_tokens=add_special_tokens and place == 0,
                split_special_tokens=letters,
            )
        return torch.tensor([ids], dtype=torch.long, device="cpu")

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
        """Repeat the n-th placeholder once for each token of the n-th image."""
        pieces = text.split(self.image_token)
        if len(pieces) != len(counts) + 1:
            raise LabError(
                f"the model's chat template made {len(pieces) - 1} image placeholders of {len(counts)} images"
            )
        return pieces[0] + "".join(
            self.image_token * count + piece for count, piece in zip(counts, pieces[1:])
        )


class AutoProcessorAdapter:
    """transformers' own processor of another family (GlmAsr, Gemma3n, ...), behind the lab's interface.

    Args:
        processor: the processor that ``AutoProcessor.from_pretrained`` returns.
        modalities: what the family takes besides text.
        dtype: the dtype floating inputs (pixels, spectrograms) are cast to, as these models expect.
    """

    def __init__(
        self, processor: ProcessorMixin, modalities: Sequence[str], dtype: torch.dtype = torch.float32
    ):
        self._processor = processor
        self.tokenizer = processor.tokenizer
        self.modalities = tuple(modalities)
        self.missing: dict[str, str] = {}
        self.dtype = dtype

    def __call__(self, messages: Sequence[Message], enable_thinking: bool = False) -> dict[str, torch.Tensor]:
        """Inputs for a conversation, as the family's processor names them.

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


def processor_of(
    source: str, name: str, config: PreTrainedConfig, family: Family, dtype: torch.dtype
) -> Processor:
    """The processor of a checkpoint, built without torchvision.

    Args:
        source: the checkpoint's folder or hub id.
        name: the model's name, for messages.
        config: its configuration.
        family: its family.
        dtype: the dtype of floating inputs, where transformers' own processor makes them.
    """
    from transformers import AutoProcessor, AutoTokenizer

    if family.name == "pocket":
        from labkit.models.pocket import PocketProcessor

        return PocketProcessor.from_pretrained(source)
    tokenizer = AutoTokenizer.from_pretrained(source)
    if family.name == "Glm4v":
        from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil

        pixels = Glm4vImageProcessorPil.from_pretrained(source)
        token = tokenizer.convert_ids_to_tokens(config.image_token_id)
        return TemplateProcessor(tokenizer, pixels, token)
    if not family.modalities:
        return TemplateProcessor(tokenizer)
    try:
        processor = AutoProcessor.from_pretrained(source)
        if not hasattr(
            processor, "tokenizer"
        ):  # transformers returns a tokenizer where there is no processor
            raise ValueError("it has a tokenizer only")
        return AutoProcessorAdapter(processor, family.modalities, dtype)
    except (ImportError, OSError, ValueError) as error:
        reason = f"its processor cannot be built here ({_first_line(error)})"
        logger.warning("%s takes text only: %s", name, reason)
        return TemplateProcessor(tokenizer, missing=dict.fromkeys(family.modalities, reason))


def plain_text(messages: Sequence[Message]) -> str:
    """The text parts of messages, a paragraph for each message."""
    paragraphs = [
        "\n".join(part["text"] for part in _parts(message) if part["type"] == "text") for message in messages
    ]
    return "\n\n".join(paragraphs)


def _parts(message: Message) -> list[Mapping[str, Any]]:
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
