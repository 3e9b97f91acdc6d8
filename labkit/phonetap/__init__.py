"""PhoneTap: synthetic phone screens with exact ground truth, to measure whether a model's taps land. No torch."""

from labkit.common.errors import ScreenError
from labkit.phonetap.agent import PhoneScore, Run, Turn, evaluate, run
from labkit.phonetap.items import SPLITS, Item, items, splits_of
from labkit.phonetap.phone import Phone, Place
from labkit.phonetap.scoring import Score, score
from labkit.phonetap.screens import KINDS, Element, Screen, draw_screen
from labkit.phonetap.tasks import Task, TaskStep, tasks

__all__ = [
    "KINDS",
    "SPLITS",
    "Element",
    "Item",
    "Phone",
    "PhoneScore",
    "Place",
    "Run",
    "Score",
    "Screen",
    "ScreenError",
    "Task",
    "TaskStep",
    "Turn",
    "draw_screen",
    "evaluate",
    "items",
    "run",
    "score",
    "splits_of",
    "tasks",
]
