"""A simulated phone, and the loop in which an agent drives it through a service. No torch.

from labkit import phone
from labkit.client import Client

run = phone.run(Client(), phone.tasks(1)[0])
run.done, [turn.happened for turn in run.turns]
phone.evaluate(Client(), phone.tasks(20)).success
"""

from labkit.phone.agent import PhoneScore, Run, Turn, evaluate, run
from labkit.phone.phone import Phone, PhoneError, Place
from labkit.phone.tasks import Task, TaskStep, tasks

__all__ = [
    "Phone",
    "PhoneError",
    "PhoneScore",
    "Place",
    "Run",
    "Task",
    "TaskStep",
    "Turn",
    "evaluate",
    "run",
    "tasks",
]
