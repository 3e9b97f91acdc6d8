"""The agent loop: look at the phone, ask the model, carry out its action, until the task is done."""

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
    """The client that the loop asks: `labkit.client.Client`, or any object with its `ask`."""

    def ask(self, text: str | None = None, **options: Any) -> Any:
        """Return an answer with ``text`` and ``reasoning``."""


@dataclass(frozen=True)
class Turn:
    """One turn of the loop: screen and instruction, the model's answer, its action and the effect."""

    picture: Image.Image = field(repr=False)
    instruction: str
    text: str
    reasoning: str
    action: Action | None
    happened: str
    right: bool


@dataclass(frozen=True)
class Run:
    """One attempt at a task.

    Attributes:
        turns: the turns, in order.
        done: the phone reached the task's last place.
        steps_done: number of steps that succeeded.
    """

    task: Task
    turns: tuple[Turn, ...]
    done: bool
    steps_done: int


@dataclass(frozen=True)
class PhoneScore:
    """Task success over many tasks, with its 95 % interval (Wilson), and the share of steps that succeeded."""

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
        client: the client of the model's service.
        guided: give the model one step at a time, as the pocket model was trained; the run ends at the first wrong
            step. False gives it the whole goal and its own earlier turns, as AutoGLM is used; the run ends when it
            answers ``finish``.
        thinking: let it think before each answer.
        max_turns: limit of turns if not guided.
        on_turn: called with each turn as it ends.
        parameters: passed on to ``client.ask``.
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
        instruction = task.goal if number == 0 else "** Screen Info **"
        reply = client.ask(instruction, image=picture, messages=history, **options)
        action = parse_answer(reply.text).action
        happened = phone.do(action) if action is not None else "the answer holds no action"
        right = phone.place == task.steps[-1].place
        yield Turn(picture, instruction, reply.text, reply.reasoning, action, happened, right)
        if action is None or action.name == "finish":
            return
        # Earlier pictures are left out, as AutoGLM's own client does: they would fill the context.
        history += [{"role": "user", "content": instruction}, {"role": "assistant", "content": reply.text}]


def evaluate(client: Asks, tasks: Sequence[Task], *, progress: bool = True, **options: Any) -> PhoneScore:
    """Run every task; ``options`` are those of `run`."""
    from tqdm.auto import tqdm

    runs = tuple(
        run(client, task, **options)
        for task in tqdm(tasks, desc="tasks", unit=" tasks", disable=not progress)
    )
    done = sum(result.done for result in runs)
    steps = sum(result.steps_done for result in runs) / sum(len(result.task.steps) for result in runs)
    return PhoneScore(runs, done / len(runs), wilson_interval(done, len(runs)), steps)
