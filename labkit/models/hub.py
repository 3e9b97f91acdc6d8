"""Files of a model, in its folder or on the Hugging Face hub; an unreachable hub is reported within seconds."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import Any

from labkit.common.errors import HubError, LoadError
from labkit.models.spec import ModelSpec


def model_file(spec: ModelSpec, name: str) -> Path:
    """A file of a model, which may not exist in a folder; from the hub it is downloaded if it is not in the cache.

    Raises:
        HubError: see `_from_hub`.
    """
    return _from_hub(spec.source, name) if spec.folder is None else spec.folder / name


def read_json(spec: ModelSpec, name: str) -> dict[str, Any]:
    """The object in a JSON file of a model.

    Raises:
        LoadError: the file is missing or broken, or holds no object.
    """
    path = model_file(spec, name)
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        where = f"the folder {spec.folder}" if spec.folder else spec.source
        raise LoadError(f"{where} has no {name}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise LoadError(f"{path} is broken: {_first_line(error)}") from None
    if not isinstance(facts, dict):
        raise LoadError(f"{path} is broken: expected an object")
    return facts


def _from_hub(source: str, name: str) -> Path:
    """A file of a hub repository, downloaded if it is not in the cache.

    Raises:
        HubError: no such repository or file, no access, or no connection (raised within seconds).
    """
    import huggingface_hub
    from huggingface_hub import constants, try_to_load_from_cache

    cached = try_to_load_from_cache(source, name)
    try:
        if not isinstance(cached, str) and not constants.HF_HUB_OFFLINE:
            _ask_for(f"{constants.ENDPOINT}/{source}/resolve/main/{name}")
        return Path(cached if isinstance(cached, str) else huggingface_hub.hf_hub_download(source, name))
    except Exception as error:
        raise HubError(
            f"{source} is not in the local cache and cannot be read from the hub ({_first_line(error)}). "
            "Is the name right and the hub in reach? A local folder can be given instead"
        ) from None


def _ask_for(url: str, timeout_s: float = 10.0) -> None:
    """Raise OSError if the address does not respond; the hub's own client would retry for half a minute."""
    request = urllib.request.Request(url, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=timeout_s).close()
    except urllib.error.HTTPError:
        return  # the server responds; the hub's client explains the error
    except urllib.error.URLError as error:
        raise OSError(str(error.reason)) from None


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
