"""Keeps the caller's torch state out of the lab: default dtype, default device, autocast, inference mode.

A program may set any of these for models of its own. Inside a `guarded` function they are torch's defaults, and
afterwards, whether it returns or raises, what the caller had set.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from inspect import isgeneratorfunction
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")

AUTOCAST_DEVICES = ("cpu", "cuda")


class _DefaultDtype:
    """fp32 as the default dtype while any thread is inside.

    torch has one default dtype for all threads: the first thread that enters sets it, the last that leaves gives the
    caller's back.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._callers = torch.float32

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._callers = torch.get_default_dtype()
                if self._callers != torch.float32:
                    torch.set_default_dtype(torch.float32)
            self._inside += 1

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            # Where fp32 was the caller's and nothing failed, another value is one that the caller's other threads
            # have set meanwhile.
            if not self._inside and (kind is not None or self._callers != torch.float32):
                torch.set_default_dtype(self._callers)


_default_dtype = _DefaultDtype()
_thread = threading.local()


@contextmanager
def default_torch_state() -> Iterator[None]:
    """Torch's defaults within the context; a context inside another one changes nothing.

    Not touched, because they belong to the whole process and change no result of the lab: deterministic algorithms,
    the number of threads, the default generator.
    """
    if getattr(_thread, "inside", False):
        yield
        return
    with _default_dtype, ExitStack() as stack:
        if torch.is_inference_mode_enabled():  # weights made there could not be changed outside of it
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
        for device in AUTOCAST_DEVICES:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if torch.empty(0).device.type != "cpu":  # twenty times as quick as get_default_device
            stack.enter_context(torch.device("cpu"))
        _thread.inside = True
        try:
            yield
        finally:
            _thread.inside = False


def guarded(function: Callable[P, T]) -> Callable[P, T]:
    """Decorator: the function, or each step of a generator, runs in `default_torch_state`. For every function that a
    caller enters the lab by and that computes in the caller's process."""
    if isgeneratorfunction(function):
        return _guarded_generator(function)

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        with default_torch_state():
            return function(*args, **kwargs)

    return call


def _guarded_generator(function: Callable[P, T]) -> Callable[P, T]:
    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> Iterator[object]:
        items = function(*args, **kwargs)
        while True:
            with default_torch_state():  # not while the caller has the item
                try:
                    item = next(items)
                except StopIteration:
                    return
            yield item

    return call


@contextmanager
def num_threads(count: int | None) -> Iterator[None]:
    """So many threads of torch within the context (None: as many as there are)."""
    before = torch.get_num_threads()
    torch.set_num_threads(before if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
