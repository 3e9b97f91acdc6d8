"""PhoneTap: synthetic phone screens with exact ground truth, and the question whether the tap lands. No torch."""

from labkit.phonetap.items import SPLITS, Item, ItemError, items
from labkit.phonetap.scoring import Score, score
from labkit.phonetap.screens import KINDS, Element, Screen, ScreenError, draw_screen

__all__ = [
    "KINDS",
    "SPLITS",
    "Element",
    "Item",
    "ItemError",
    "Score",
    "Screen",
    "ScreenError",
    "draw_screen",
    "items",
    "score",
]
