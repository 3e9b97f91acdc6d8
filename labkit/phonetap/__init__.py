"""PhoneTap: synthetic phone screens with exact ground truth, and the question whether the tap lands. No torch."""

from labkit.phonetap.agent import PhoneScore, Run, Turn, evaluate, run
from labkit.phonetap.items import SPLITS, Item, ItemError, items
from labkit.phonetap.phone import Phone, PhoneError, Place
from labkit.phonetap.scoring import Score, score
from labkit.phonetap.screens import KINDS, Element, Screen, ScreenError, draw_screen
from labkit.phonetap.tasks import Task, TaskStep, tasks

__all__ = [
    "KINDS",
    "SPLITS",
    "Element",
    "Item",
    "ItemError",
    "Phone",
    "PhoneError",
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
    "tasks",
]
