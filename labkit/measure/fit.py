"""Will it fit? What a plan needs in memory on a device, from the model's configuration alone.

    for need in needs("autoglm-phone-9b", ["bf16", "int4"], context=8192):
        print(need.plan, need.total_bytes, need.fits(find_card("rtx-4060").memory_bytes))

Four things share the memory: the weights, the KV cache of one conversation, the activations of the longest prompt,
and room to work in. The first two are exact; the others are counted from shapes (see `activation_bytes` and
`workspace_bytes`). The device's own context, a few hundred MB on CUDA, belongs to none of them.
"""

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
"""About what the driver and torch's kernels take of a card before a model is there."""


@dataclass(frozen=True)
class Card:
    """A card: its memory in bytes, and how many bytes a second it reads at best."""

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
    """A card by name; capitals, spaces and the maker's name do not matter. Raises LabError."""
    known = {card.name: card for card in CARDS}
    wanted = re.sub(r"[\s_]+", "-", name.strip().lower()).removeprefix("nvidia-").removeprefix("geforce-")
    if wanted in known:
        return known[wanted]
    near = difflib.get_close_matches(wanted, known, 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise LabError(f"unknown card {name!r}{hint} Known: {', '.join(known)}. Or give --memory and --bandwidth")


SCREEN = (1080, 2400)
"""Pixels of a usual phone's screenshot."""
LIBRARY_BYTES = 32 << 20
"""What cuBLAS keeps for itself on recent cards."""
_WHOLE = ("fp32", "fp16", "bf16")
_KEEPS_CODES = ("int8-dynamic", "llm-int8")  # multiply codes; nothing is unpacked for many rows


@dataclass(frozen=True)
class Need:
    """What one plan needs; see the module. Bytes, but for `read_bytes`: what decoding one token has to read."""

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
        """Whether it fits in so much free memory."""
        return self.total_bytes <= memory_bytes

    def most_tokens_per_s(self, bandwidth_bytes_per_s: float) -> float:
        """The decode speed that memory's bandwidth allows at best, one conversation at a time.

        The roofline (Williams et al., 2009): a token reads every weight of the decoder and the head once, and the cache.
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
    """What each plan needs for one conversation.

    Args:
        model: a name, a folder or a hub id.
        plans: names, files or plans.
        context: tokens of the conversation, prompt and answer; the cache holds them all.
        screen: pixels (width, height) of the screenshot in the prompt; None for text alone.
        max_pixels: the image processor's limit; see `Anatomy.image_tokens`.

    Raises:
        LabError: an unknown model or plan; a context below 1, or one that does not hold the screenshot.
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
    """Bytes alive at the worst moment of a prompt's pass: in an MLP of the decoder, or in an attention of the eye.

    The decoder's, a token: embedding, residual and its norm, [hidden] each; gate and up in one [2 F]; the activated gate and
    the product, [F] each. The eye's, a patch: residual, norm and the projections of query, key and value, [5 hidden];
    query and key once more in 32 bits, and what their rotation makes of them there, [6 hidden]; angles; the pixels. A token
    is four patches. The two do not happen at the same time.
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
    """Keys and values of one layer in the type the model computes in: what the model's own modules make of an int8 cache
    when they decode, a layer at a time; the captured step (`labkit.engine.step_gpu`) reads it as it is. 0 for any
    other cache that is read as it is."""
    plan = anatomy.resolved.plan
    if plan.runtime.kv_cache in (None, plan.default):
        return 0
    layers = anatomy.skeleton.config.get_text_config(decoder=True).num_hidden_layers
    whole = anatomy.under(dataclasses.replace(plan, runtime=RuntimeOptions()))
    kept = keeping_of(plan.runtime).kept(tokens)
    return kept * whole.kv_cache_bytes_per_token() // layers


def workspace_bytes(anatomy: Anatomy) -> int:
    """Room for the largest stretch of a weight that a prompt's pass unpacks at a time (`sliced_multiply`), and for the
    library's own buffers."""
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
