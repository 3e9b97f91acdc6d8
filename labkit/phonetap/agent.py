"""The loop: look at the phone, ask the model, do what it says, until the task is done."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from PIL import Image

from labkit.common.actions import Action, parse_answer
from labkit.common.intervals import wilson_interval
from labkit.phonetap.phone import Phone
from labkit.phonetap.tasks import Task

MAX_TURNS = 12


class Asks(Protocol):
    """What the loop asks: `labkit.client.Client`, or anything with its `ask`."""

    def ask(self, text: str | None = None, **options: Any) -> Any:
        """An answer with ``text`` and ``reasoning``."""


@dataclass(frozen=True)
class Turn:
    """One look, one answer, one action: what was seen and asked, what came, what happened."""

    picture: Image.Image = field(repr=False)
    instruction: str
    text: str
    reasoning: str
    action: Action | None
    happened: str
    right: bool


@dataclass(frozen=True)
class Run:
    """A task that was tried.

    Attributes:
        turns: what happened, one by one.
        done: the phone is where the task leads.
        steps_done: how many steps were.
    """

    task: Task
    turns: tuple[Turn, ...]
    done: bool
    steps_done: int


@dataclass(frozen=True)
class PhoneScore:
    """Task success over many tasks, with its 95 % interval (Wilson), and the share of steps that were done."""

    runs: tuple[Run, ...] = field(repr=False)
    success: float
    interval: tuple[float, float]
    steps: float


def run(
    client: Asks,
    task: Task,
    *,
    guided: bool = True,
    thinking: bool = False,
    max_turns: int = MAX_TURNS,
    on_turn: Callable[[Turn], None] | None = None,
    **parameters: Any,
) -> Run:
    """Let a model do a task.

    Args:
        client: who is asked.
        guided: the model is told one step at a time, as the pocket model was trained; it fails at the first step
            that goes wrong. False tells it the whole goal with its own earlier turns, as AutoGLM is used; it ends
            when it says ``finish``.
        thinking: let it think before each answer.
        max_turns: most turns without guidance.
        on_turn: told each turn as it ends.
        parameters: of the service.
    """
    phone, turns = task.phone(), []
    driver = _guided if guided else _by_itself
    for turn in driver(client, phone, task, max_turns, {"thinking": thinking, **parameters}):
        turns.append(turn)
        if on_turn is not None:
            on_turn(turn)
    done = phone.place == task.steps[-1].place and all(turn.right for turn in turns if guided)
    steps = sum(turn.right for turn in turns) if guided else len(task.steps) * done
    return Run(task, tuple(turns), done, steps)


def _guided(client: Asks, phone: Phone, task: Task, limit: int, options: dict) -> Iterable[Turn]:
    for step in task.steps:
        picture = phone.picture()
        reply = client.ask(step.instruction, image=picture, **options)
        action = parse_answer(reply.text).action
        happened = phone.do(action) if action is not None else "the answer holds no action"
        right = action is not None and phone.place == step.place
        yield Turn(picture, step.instruction, reply.text, reply.reasoning, action, happened, right)
        if not right:
            return


def _by_itself(client: Asks, phone: Phone, task: Task, limit: int, options: dict) -> Iterable[Turn]:
    history: list[dict[str, Any]] = []
    for number in range(limit):
        picture = phone.picture()
        told = task.goal if number == 0 else "** Screen Info **"
        reply = client.ask(told, image=picture, messages=history, **options)
        action = parse_answer(reply.text).action
        happened = phone.do(action) if action is not None else "the answer holds no action"
        right = phone.place == task.steps[-1].place
        yield Turn(picture, told, reply.text, reply.reasoning, action, happened, right)
        if action is None or action.name == "finish":
            return
        # Earlier pictures are left out, as AutoGLM's own client does: they would fill the context.
        history += [{"role": "user", "content": told}, {"role": "assistant", "content": reply.text}]


def evaluate(client: Asks, tasks: Sequence[Task], *, progress: bool = True, **options: Any) -> PhoneScore:
    """Run every task; ``options`` are those of `run`."""
    from tqdm.auto import tqdm

    runs = tuple(
        run(client, task, **options)
        for task in tqdm(tasks, desc="tasks", unit=" tasks", disable=not progress)
    )
    done = sum(run.done for run in runs)
    steps = sum(run.steps_done for run in runs) / sum(len(run.task.steps) for run in runs)
    return PhoneScore(runs, done / len(runs), wilson_interval(done, len(runs)), steps)
