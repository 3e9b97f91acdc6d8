"""Batches on their way to the device: read in a thread, their screens beside them, handed out in the order asked for."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections import defaultdict, deque

import torch

from labkit.models.pocket.training.batches import Batch, BatchSource


class Prefetch:
    """Reads a BatchSource in a thread and puts its arrays on the device in a stream of their own, in order.

    Iterating gives ("slots", size, first, pixels) and (Batch, tensors).
    """

    def __init__(self, source: BatchSource, device: torch.device, depth: int = 8) -> None:
        self.source, self.device = source, device
        self.ready: queue.Queue = queue.Queue(maxsize=depth)
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        threading.Thread(target=self._read, daemon=True).start()

    def _move(self, array) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.stream else tensor

    def _read(self) -> None:
        with torch.cuda.stream(self.stream) if self.stream else contextlib.nullcontext():
            for message in self.source:
                if isinstance(message, Batch):
                    content = (message, {name: self._move(array) for name, array in message.arrays.items()})
                else:
                    _, size, first, count = message
                    fresh = self._move(self.source.pixels[size][first : first + count].copy())
                    content = ("slots", size, first, fresh)
                done = self.stream.record_event() if self.stream else None
                self.ready.put((content, done))

    def __iter__(self):
        while True:
            content, done = self.ready.get()
            if done is not None:
                torch.cuda.current_stream().wait_event(done)
                tensors = content[1].values() if isinstance(content[0], Batch) else content[3:]
                for tensor in tensors:
                    tensor.record_stream(torch.cuda.current_stream())
            yield content


class Feed:
    """Batches with their tensors on the device, `pixels` among them; `.take()` gives the next, of any kind or of one.

    Processes that average their gradients wait for each other, so they take batches of the same kind and size.
    """

    most_waiting = 12  # of a kind that nobody asks for

    def __init__(self, source: BatchSource, device: torch.device) -> None:
        self.pixels = [torch.zeros(p.shape, dtype=torch.uint8, device=device) for p in source.pixels]
        self.messages = iter(Prefetch(source, device))
        self.waiting: dict[tuple[str, int], deque] = defaultdict(deque)

    def _next(self) -> tuple[Batch, dict[str, torch.Tensor]]:
        """The next batch; new screens that come before it are put in their slots."""
        while True:
            first, *rest = next(self.messages)
            if isinstance(first, Batch):
                data = rest[0]
                if "slots" in data:
                    data["pixels"] = self.pixels[first.size][data["slots"]]
                return first, data
            size, start, fresh = rest
            self.pixels[size][start : start + len(fresh)] = fresh

    def take(self, kind: str | None = None, size: int | None = None) -> tuple[Batch, dict[str, torch.Tensor]]:
        """The next batch, or the next of one kind and size (of the rest the oldest are dropped in time)."""
        if kind is None:
            return self._next()
        while not self.waiting[kind, size]:
            batch, data = self._next()
            self.waiting[batch.kind, batch.size].append((batch, data))
            for others in self.waiting.values():
                if len(others) > self.most_waiting:
                    others.popleft()
        return self.waiting[kind, size].popleft()
