"""Recorded outputs of the layers before a changed one, which therefore need not be computed again."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class _Call:
    """One call of a block: when it began and ended, in ticks of its pass, and its output."""

    began: int
    ended: int = 0
    output: Any = None


class Replay:
    """The recorded passes of several batches.

    One pass of each batch records the outputs of the model's blocks (the members of its lists of layers, and the
    parts that hold such lists) and their times. While one Linear is changed, each block that ended before the first
    call of that Linear returns its recorded output; the rest is computed. The result is the same, at about half the
    cost on average.

    Args:
        model: in evaluation mode; its passes must be the same each time.
        run: runs the batch with the given number through the model.
        count: number of batches.
        targets: names of the Linears to change.
    """

    def __init__(
        self, model: nn.Module, run: Callable[[int], Any], count: int, targets: Collection[str]
    ) -> None:
        self._blocks = {name: model.get_submodule(name) for name in blocks_of(model, targets)}
        self._targets = {name: model.get_submodule(name) for name in targets}
        self._first: list[dict[str, int]] = []  # of each batch: when each target was first called
        self._calls: list[dict[str, list[_Call]]] = []
        self._run, self._batch, self._now = run, 0, 0
        for index in range(count):
            self._record(index)

    def run(self, batch: int) -> Any:
        """Run a batch through the model and return what ``run`` returns; inside `before`, compute only the rest."""
        self._batch, self._now = batch, 0
        return self._run(batch)

    def comes_to(self, target: str, batch: int) -> bool:
        """Whether a batch calls the target at all: if not, changing the target changes nothing."""
        return target in self._first[batch]

    @contextmanager
    def before(self, target: str) -> Iterator[None]:
        """Within this context, blocks that ended before the first call of ``target`` return their recorded outputs."""
        patched = [
            (name, block)
            for name, block in self._blocks.items()
            if name != target and not target.startswith(f"{name}.")
        ]
        for name, block in patched:
            block.forward = self._answering(name, block.forward, target)
        try:
            yield
        finally:
            for _, block in patched:
                del block.forward

    def _answering(self, name: str, original: Callable, target: str) -> Callable:
        def forward(*arguments: Any, **options: Any) -> Any:
            start = self._first[self._batch].get(target)
            call = next(
                (recorded for recorded in self._calls[self._batch][name] if recorded.began >= self._now), None
            )
            if call is None or start is None:
                return original(*arguments, **options)
            if call.ended < start:
                self._now = call.ended
                return _copy(call.output)
            self._now = call.began
            output = original(*arguments, **options)
            self._now = call.ended
            return output

        return forward

    @torch.no_grad()
    def _record(self, batch: int) -> None:
        clock, first = 0, {}
        calls: dict[str, list[_Call]] = {name: [] for name in self._blocks}

        def note(name: str) -> Callable:
            def hook(*_: Any) -> None:
                nonlocal clock
                clock += 1
                first.setdefault(name, clock)

            return hook

        def begin(name: str) -> Callable:
            def hook(*_: Any) -> None:
                nonlocal clock
                clock += 1
                calls[name].append(_Call(clock))

            return hook

        def end(name: str) -> Callable:
            def hook(module: nn.Module, arguments: tuple, output: Any) -> None:
                nonlocal clock
                clock += 1
                calls[name][-1].ended, calls[name][-1].output = clock, _copy(output)

            return hook

        handles = [module.register_forward_pre_hook(note(name)) for name, module in self._targets.items()]
        for name, block in self._blocks.items():
            handles += [block.register_forward_pre_hook(begin(name)), block.register_forward_hook(end(name))]
        try:
            self._run(batch)
        finally:
            for handle in handles:
                handle.remove()
        self._calls.append(calls)
        self._first.append(first)


def blocks_of(model: nn.Module, targets: Collection[str]) -> list[str]:
    """Names of the modules whose outputs are worth recording.

    These are the members of lists of layers that hold a target, and the parts that contain such a list, except a
    part that contains all of them: nothing comes after it.
    """
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and name]
    lists = [name for name in lists if any(target.startswith(f"{name}.") for target in targets)]
    members = [f"{name}.{index}" for name in lists for index in range(len(model.get_submodule(name)))]
    parts = {name.rpartition(".")[0] for name in lists}
    around = [part for part in parts if part and not all(name.startswith(f"{part}.") for name in lists)]
    return [*members, *sorted(around)]


def _copy(value: Any) -> Any:
    """A copy with cloned tensors, inside tuples, lists, mappings and the outputs of transformers' models too."""
    if isinstance(value, Tensor):
        return value.clone()
    if type(value) is dict:
        return {key: _copy(item) for key, item in value.items()}
    if isinstance(value, dict):  # ModelOutput
        return type(value)(**{key: _copy(item) for key, item in value.items()})
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(_copy, value))
    return type(value)(map(_copy, value)) if type(value) in (tuple, list) else value
