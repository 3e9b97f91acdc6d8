"""Writes files and folders atomically: neither a reader nor a run after a crash sees a partial file."""

import ctypes
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from labkit.common.errors import LabError, ResultsError

PACKAGE_FOLDER = Path(__file__).resolve().parents[1]
"""Where the package is imported from."""


def assets_folder() -> Path:
    """The folder of shipped weights, plans, fonts, recordings and results.

    ``$LABKIT_ASSETS`` if set, else ``assets/`` inside the package (an installation) or beside it (a checkout).
    """
    if override := os.environ.get("LABKIT_ASSETS"):
        if not (folder := user_path(override)).is_dir():
            raise LabError(f"$LABKIT_ASSETS names no folder: {override}")
        return folder
    inside = PACKAGE_FOLDER / "assets"
    return inside if inside.is_dir() else checkout_folder() / "assets"


def checkout_folder() -> Path:
    """The folder the package lies in: the checkout, or an environment's site-packages."""
    return PACKAGE_FOLDER.parent


def user_path(text: str | os.PathLike) -> Path:
    """The path that a user names, ``~`` resolved; nothing needs to be there.

    Raises:
        LabError: a home of nobody, or a name that no file can have.
    """
    try:
        path = Path(text).expanduser()
        path.lstat()
    except RuntimeError:
        reason = f"this machine knows no home of {str(text).partition('/')[0]}"
    except ValueError:
        reason = "a path holds no NUL character"
    except OSError as error:
        if error.errno not in (errno.ENAMETOOLONG, errno.EINVAL):  # other faults show where the path is used
            return path
        reason = f"no file can be called that: {error.strerror}"
    else:
        return path
    raise LabError(f"{shortened(os.fspath(text))}: {reason}")


def reason_of(error: OSError) -> str:
    """``FILE: No space left on device``: an OSError in a phrase, with its file if it names one."""
    reason = error.strerror or " ".join(str(error).split())
    return reason if error.filename is None else f"{shortened(str(error.filename), 200)}: {reason}"


def shortened(text: str, length: int = 80) -> str:
    """The text, cut to a length that fits a message of one line."""
    return text if len(text) <= length else f"{text[: length - 1]}…"


@contextmanager
def naming(path: str | os.PathLike, temporary: Path | None = None) -> Iterator[None]:
    """Name the file in an OSError of the block: a failed write, as on a full disk, carries no name."""
    try:
        yield
    except OSError as error:
        if error.filename in (None, temporary, str(temporary)):
            error.filename = str(path)
        raise


@contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it is renamed into place when the block ends without an error.

    The temporary name keeps the suffix (``.json``, ``.png``), because many writers choose the format by it.
    Missing parent folders are created. If the block raises, the temporary file is removed and `path` stays
    unchanged. The file gets the permissions that a plain ``open(path, "w")`` gives.

    >>> with atomic_path("results/first/results.json") as temporary:
    ...     temporary.write_text("{}")
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        with naming(path, temporary):
            yield temporary
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


@contextmanager
def atomic_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Yield an empty temporary folder beside `path`; it takes that name when the block ends without an error.

    An existing folder is swapped with the new folder in a single step where the system supports it (Linux), then
    removed. If the block raises, the new folder is removed and the old folder stays. Files get the permissions that
    a plain ``open(path, "w")`` gives. Leftovers of killed processes beside `path` are removed first.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        probe = temporary / ".mode"
        probe.touch()
        mode = probe.stat().st_mode & 0o777
        probe.unlink()
        for file in sorted(temporary.rglob("*")):
            if file.is_file():
                file.chmod(mode)
                with file.open("rb+") as opened:
                    os.fsync(opened.fileno())
        if not path.exists():
            temporary.rename(path)
        elif not _exchange(temporary, path):
            old = path.with_name(f".{path.name}.{os.getpid()}.old")
            path.rename(old)
            temporary.rename(path)
            shutil.rmtree(old)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sha256_of(path: str | os.PathLike) -> str:
    """The SHA-256 of a file's content, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _exchange(first: Path, second: Path) -> bool:
    """Swap two paths in a single step; False where the system cannot."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None) if os.name == "posix" else None
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if renameat2 is None:
        return False
    return not renameat2(here, os.fsencode(first), here, os.fsencode(second), exchange)


def _remove_leftovers(path: Path) -> None:
    """Remove temporary folders of dead processes; restore the old folder of `path` if such a process had moved it."""
    for leftover in path.parent.glob(f".{path.name}.*"):
        number, kind = leftover.name.removeprefix(f".{path.name}.").partition(".")[::2]
        if kind not in ("tmp", "old") or not number.isdigit() or _is_running(int(number)):
            continue
        if kind == "old" and not path.exists():
            leftover.rename(path)
        else:
            shutil.rmtree(leftover, ignore_errors=True)


def _is_running(process: int) -> bool:
    if process == os.getpid():
        return False
    if os.name != "posix":  # elsewhere, signal 0 is not a mere test
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def read_json(path: str | os.PathLike) -> Any:
    """Parse a JSON file. Raises `ResultsError` with the file and the place of the damage."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ResultsError(f"{path}: no such file") from None
    except UnicodeDecodeError:
        raise ResultsError(f"{path}: damaged: not UTF-8 text") from None
    except OSError as error:
        raise ResultsError(f"{path}: cannot be read: {error.strerror}") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise ResultsError(f"{path}: damaged: {error}") from None
