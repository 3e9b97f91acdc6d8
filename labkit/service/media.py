"""Requests' pictures and recordings, decoded in threads: so many pixels at a time, whoever asks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from labkit.common.errors import ApiError
from labkit.service.conversation import fetch_images, lab_messages, pixels_by_place
from labkit.service.memory import give_back_memory
from labkit.service.messages import Message
from labkit.service.options import ServiceOptions
from labkit.service.remote import RemoteImages

T = TypeVar("T")
THREADS = 2
LARGE = 8_000_000
"""Pixels of a request that waits among its like, so that nobody's screenshot does; its memory is given back at once."""


class Budget:
    """An amount that requests share. A request takes what it needs once there is so much; requests wait in turn.

    Args:
        total: the amount; no request may need more.
    """

    def __init__(self, total: int):
        self.total, self.used = total, 0
        self._turn, self._freed = asyncio.Lock(), asyncio.Event()

    @asynccontextmanager
    async def taken(self, amount: int, seconds: float) -> AsyncIterator[None]:
        """While the block runs, ``amount`` is taken.

        Raises:
            ApiError: 429, if there was not enough within ``seconds``.
        """
        try:
            async with asyncio.timeout(seconds), self._turn:
                while self.used + amount > self.total:
                    self._freed.clear()
                    await self._freed.wait()
        except TimeoutError:
            raise ApiError(
                "the service is busy with the pictures of other requests; try again later",
                429,
                code="queue_full",
                headers={"Retry-After": "2"},
            ) from None
        self.used += amount
        try:
            yield
        finally:
            self.used -= amount
            self._freed.set()


class Media:
    """Loads what requests' messages hold.

    Args:
        options: limits, and whether images are fetched from the web.
    """

    def __init__(self, options: ServiceOptions):
        self.options = options
        self.pixels = Budget(options.max_pixels)
        self._small = Budget(2 * LARGE)
        self._remote = RemoteImages() if options.allow_remote_images else None
        self._threads = ThreadPoolExecutor(THREADS, "labkit-media")

    async def fetch(self, messages: list[Message]) -> dict[str, bytes]:
        """As `labkit.service.conversation.fetch_images`."""
        return await fetch_images(messages, self._remote)

    @asynccontextmanager
    async def decoded(
        self, messages: list[Message], fetched: Mapping[str, bytes], seconds: float
    ) -> AsyncIterator[list[dict[str, Any]]]:
        """The lab's messages; their pictures count as being decoded until the block ends.

        Args:
            messages: a request's.
            fetched: the bytes behind web addresses.
            seconds: how long to wait for other requests' pictures.

        Raises:
            ApiError: too many pixels, or an image or a recording that cannot be used.
        """
        pixels = await in_thread(self._threads, self._pixels, messages, fetched)
        is_large = pixels > min(LARGE, self.pixels.total // 8)
        try:
            async with (self.pixels if is_large else self._small).taken(pixels, seconds):
                yield await in_thread(self._threads, self._load, messages, fetched, is_large)
        finally:
            if is_large:
                asyncio.get_running_loop().run_in_executor(None, give_back_memory)

    def _load(
        self, messages: list[Message], fetched: Mapping[str, bytes], is_large: bool
    ) -> list[dict[str, Any]]:
        loaded = lab_messages(messages, fetched)
        if is_large:
            give_back_memory()  # what decoding took besides
        return loaded

    def _pixels(self, messages: list[Message], fetched: Mapping[str, bytes]) -> int:
        """Pixels of all images, as their headers say."""
        total, limit = 0, self.options.max_pixels
        for where, pixels in pixels_by_place(messages, fetched):
            total += pixels
            if total > limit:
                raise ApiError(
                    f"{where}: the images of one request may have {limit:,} pixels together; up to here they "
                    f"have {total:,}: scale them down",
                    param=where,
                    code="too_many_pixels",
                )
        return total

    async def close(self) -> None:
        """Let go of threads and connections."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        if self._remote is not None:
            await self._remote.close()


async def in_thread(threads: ThreadPoolExecutor, work: Callable[..., T], *arguments: Any) -> T:
    """Run ``work`` in a thread. If this is cancelled, work that has begun is waited for: it still uses memory."""
    running = threads.submit(work, *arguments)
    try:
        return await asyncio.wrap_future(running)
    except asyncio.CancelledError:
        if not running.cancelled():
            await asyncio.wait([asyncio.wrap_future(running)])
        raise
