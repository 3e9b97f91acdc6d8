"""Writing files so that a reader, or a second run after a crash, never sees half of one."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it is renamed into place when the block ends without an error.

    The temporary name keeps the suffix (``.json``, ``.png``), because many writers choose the format by it.
    Missing parent folders are made. If the block raises, the temporary file is removed and `path` is left as
    it was. The file gets the permissions that a plain ``open(path, "w")`` would give it.

    >>> with atomic_path("results/first/results.json") as temporary:
    ...     temporary.write_text("{}")
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()
