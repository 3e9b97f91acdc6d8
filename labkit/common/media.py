"""The content of files, ``data:`` URLs and bytes that users give as images and recordings. Web addresses are not fetched."""

from __future__ import annotations

import base64
import binascii
from pathlib import Path
from urllib.parse import unquote_to_bytes

from labkit.common.errors import LabError, MediaError
from labkit.common.files import user_path

Encoded = str | Path | bytes | bytearray | memoryview
"""A file's path, a ``data:`` URL, or a file's content."""


def read_bytes(source: Encoded, what: str) -> bytes:
    """The content of a path, a ``data:`` URL or bytes.

    Raises:
        MediaError: no such file, a web address, a broken data URL, or no content.
    """
    name = f"the {what}"
    if isinstance(source, bytes | bytearray | memoryview):
        data = bytes(source)
    elif isinstance(source, str) and source.startswith("data:"):
        data = _decode_data_url(source, what)
        name = f"the data URL of the {what}"
    elif isinstance(source, str) and source.startswith(("http://", "https://", "file:", "ftp:")):
        raise MediaError(
            f"the {what} is a web address ({source[:60]}), which is not fetched: "
            "give a path, a data: URL or bytes"
        )
    else:
        name = f"the {what} {source}"
        try:
            data = user_path(source).read_bytes()
        except LabError as error:
            raise MediaError(f"the {what} {error}") from None
        except FileNotFoundError:
            raise MediaError(f"{name} does not exist") from None
        except OSError as error:
            reason = error.strerror or error
            raise MediaError(f"{name[:200]} cannot be read: {reason}") from None
    if not data:
        raise MediaError(f"{name} is empty (0 bytes)")
    return data


def _decode_data_url(url: str, what: str) -> bytes:
    header, comma, body = url.partition(",")
    if not comma:
        raise MediaError(f"the data URL of the {what} has no comma: expected data:{what}/...;base64,...")
    if not header.endswith(";base64"):
        return unquote_to_bytes(body)
    try:
        return base64.b64decode("".join(body.split()), validate=True)
    except (binascii.Error, ValueError):
        raise MediaError(f"the data URL of the {what} is not valid base64") from None


def name_of(source: object, what: str) -> str:
    """``the image /tmp/a.png``; without the path for anything but a path."""
    is_path = isinstance(source, Path) or (isinstance(source, str) and not source.startswith("data:"))
    return f"the {what} {source}" if is_path else f"the {what}"
