"""Predicts the memory that a plan needs on a device, from the model's configuration alone."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from labkit.common.errors import LabError
from labkit.engine.kv_cache import keeping_of
from labkit.measure.anatomy import Anatomy, PlanLike, dissect
from labkit.models import ModelSpec
from labkit.plans.plan import RuntimeOptions
from labkit.quantization import DTYPES
from labkit.quantization.kernels.reference import SLICE_ELEMENTS_GPU

GIB = 1 << 30
CONTEXT_BYTES = 600_000_000
"""Approximate memory of a card that the driver and torch's kernels take before a model is loaded."""


@dataclass(frozen=True)
class Card:
    """A card: its memory in bytes, and its peak bandwidth in bytes a second."""

    name: str
    memory_bytes: int
    bandwidth_bytes_per_s: float


def _card(name: str, gib: int, gigabytes_per_s: float) -> Card:
    return Card(name, gib * GIB, gigabytes_per_s * 1e9)


CARDS: tuple[Card, ...] = (
    _card("rtx-4060", 8, 272),
    _card("rtx-3070", 8, 448),
    _card("rtx-3060", 12, 360),
    _card("rtx-4070", 12, 504),
    _card("t4", 16, 320),
    _card("rtx-4080", 16, 717),
    _card("l4", 24, 300),
    _card("a10", 24, 600),
    _card("rtx-3090", 24, 936),
    _card("rtx-4090", 24, 1008),
    _card("rtx-5090", 32, 1792),
    _card("a6000", 48, 768),
    _card("l40s", 48, 864),
    _card("a100-80gb", 80, 2039),
    _card("h100", 80, 3350),
    Card("h200", 141_000_000_000, 4.8e12),
)


def find_card(name: str) -> Card:
    """A card by name; case, spaces and the maker's name do not matter. Raises LabError for an unknown card."""
    cards = {card.name: card for card in CARDS}
    key = re.sub(r"[\s_]+", "-", name.strip().lower()).removeprefix("nvidia-").removeprefix("geforce-")
    if key in cards:
        return cards[key]
    near = difflib.get_close_matches(key, cards, 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise LabError(f"unknown card {name!r}{hint} Known: {', '.join(cards)}. Or give --memory and --bandwidth")


SCREEN = (1080, 2400)
"""Pixels of a typical phone's screenshot."""
LIBRARY_BYTES = 32 << 20
"""Workspace of cuBLAS on recent cards."""
_WHOLE = ("fp32", "fp16", "bf16")
_KEEPS_CODES = ("int8-dynamic", "llm-int8")  # they multiply codes, and unpack no weights for many rows


@dataclass(frozen=True)
class Need:
    """The bytes that one plan needs: weights, KV cache of a conversation, activations of the longest prompt, workspace.

    The first two are exact; the others are counted from shapes (`activation_bytes`, `workspace_bytes`). The device's
    own context, a few hundred MB on CUDA, is not included. ``read_bytes`` is what decoding one token reads.
    """

    plan: str
    weights_bytes: int
    cache_bytes: int
    activation_bytes: int
    workspace_bytes: int
    read_bytes: int

    @property
    def total_bytes(self) -> int:
        """All four."""
        return self.weights_bytes + self.cache_bytes + self.activation_bytes + self.workspace_bytes

    def fits(self, memory_bytes: int) -> bool:
        """Whether it fits in ``memory_bytes`` of free memory."""
        return self.total_bytes <= memory_bytes

    def most_tokens_per_s(self, bandwidth_bytes_per_s: float) -> float:
        """The highest decoding speed that the bandwidth allows, one conversation at a time.

        The roofline (Williams et al., 2009): each token reads all weights of the decoder and the head, and the cache.
        """
        return bandwidth_bytes_per_s / self.read_bytes


def needs(
    model: str | Path | ModelSpec,
    plans: Sequence[PlanLike],
    *,
    context: int = 4096,
    screen: tuple[int, int] | None = SCREEN,
    max_pixels: int | None = None,
) -> list[Need]:
    """The memory that each plan needs for one conversation.

        for need in needs("autoglm-phone-9b", ["bf16", "int4"], context=8192):
            print(need.plan, need.total_bytes, need.fits(find_card("rtx-4060").memory_bytes))

    Args:
        model: a name, a folder or a hub id.
        plans: names, files or plans.
        context: tokens of the conversation, prompt and answer; the cache holds all of them.
        screen: pixels (width, height) of the screenshot in the prompt; None for text alone.
        max_pixels: the image processor's limit; see `Anatomy.image_tokens`.

    Raises:
        LabError: an unknown model or plan; a context below 1, or too small for the screenshot.
    """
    if context < 1:
        raise LabError(f"a context of {context} tokens holds nothing; 1 or more")
    anatomy = dissect(model, "bf16")
    image = 0
    if screen is not None and anatomy.parameters_by_role.get("vision"):
        image = anatomy.image_tokens(*screen, max_pixels)
        if image >= context:
            raise LabError(
                f"a screenshot of {screen[0]} x {screen[1]} takes {image} tokens, and the context has {context}: "
                "give more (--context), or fewer pixels (--max-pixels)"
            )
    return [_need(anatomy.under(plan), context, image) for plan in plans]


def activation_bytes(anatomy: Anatomy, tokens: int, image_tokens: int) -> int:
    """Peak bytes of activations in a prompt's pass: in an MLP of the decoder, or in an attention of the vision encoder.

    For a token in the decoder: embedding, residual and its norm, [hidden] each; gate and up together, [2 F]; the
    activated gate and the product, [F] each. For a patch in the vision encoder: residual, norm and the projections of
    query, key and value, [5 hidden]; query and key in 32 bits before and during their rotation, [6 hidden]; angles;
    the pixels. An image token is four patches. The two peaks do not coincide.
    """
    config = anatomy.skeleton.config
    size = DTYPES[anatomy.resolved.plan.default].itemsize
    text = config.get_text_config(decoder=True)
    decoder = tokens * (3 * text.hidden_size + 4 * text.intermediate_size) * size
    vision = getattr(config, "vision_config", None)
    if not image_tokens or vision is None:
        return decoder
    head = vision.hidden_size // vision.num_heads
    pixels = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    patch = vision.hidden_size * (5 * size + 6 * 4) + 4 * head * 4 + pixels * 4
    return max(decoder, image_tokens * vision.spatial_merge_size**2 * patch)


def unpacked_cache_bytes(anatomy: Anatomy, tokens: int) -> int:
    """Bytes of one layer's keys and values in the type the model computes in.

    The model's own modules convert an int8 cache to that type when they decode, one layer at a time; the captured step
    (`labkit.engine.step_gpu`) reads int8 directly. 0 for a cache that needs no conversion.
    """
    plan = anatomy.resolved.plan
    if plan.runtime.kv_cache in (None, plan.default):
        return 0
    layers = anatomy.skeleton.config.get_text_config(decoder=True).num_hidden_layers
    whole = anatomy.under(dataclasses.replace(plan, runtime=RuntimeOptions()))
    kept_tokens = keeping_of(plan.runtime).kept(tokens)
    return kept_tokens * whole.kv_cache_bytes_per_token() // layers


def workspace_bytes(anatomy: Anatomy) -> int:
    """Bytes for the largest slice of a weight that a prompt's pass unpacks at a time (`sliced_multiply`), and for the
    buffers of cuBLAS."""
    resolved, size = anatomy.resolved, DTYPES[anatomy.resolved.plan.default].itemsize
    unpacked = [
        part.parameters
        for part in resolved.parts
        if part.is_linear and part.scheme not in (*_WHOLE, *_KEEPS_CODES)
    ]
    return min(max(unpacked, default=0), SLICE_ELEMENTS_GPU) * size + LIBRARY_BYTES


def _need(anatomy: Anatomy, context: int, image_tokens: int) -> Need:
    parts = anatomy.resolved.parts
    cache = anatomy.kv_cache_bytes(context)
    read = sum(part.bytes for part in parts if part.role in ("decoder", "lm_head")) + cache
    return Need(
        plan=anatomy.resolved.plan.name,
        weights_bytes=anatomy.bytes,
        cache_bytes=cache,
        activation_bytes=max(
            activation_bytes(anatomy, context, image_tokens), unpacked_cache_bytes(anatomy, context)
        ),
        workspace_bytes=workspace_bytes(anatomy),
        read_bytes=read,
    )
