"""Graphics cards by name: their memory and its bandwidth, from the makers' data sheets."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from labkit.common.errors import LabError

GIB = 1 << 30
CONTEXT_BYTES = 600_000_000
"""About what the driver and torch's kernels take of a card before a model is there."""


class CardError(LabError):
    """A card whose name is not known here."""


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
    """A card by name; capitals, spaces and the maker's name do not matter. Raises CardError."""
    known = {card.name: card for card in CARDS}
    wanted = re.sub(r"[\s_]+", "-", name.strip().lower()).removeprefix("nvidia-").removeprefix("geforce-")
    if wanted in known:
        return known[wanted]
    near = difflib.get_close_matches(wanted, known, 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise CardError(
        f"unknown card {name!r}{hint} Known: {', '.join(known)}. Or give --memory and --bandwidth"
    )
