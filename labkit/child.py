"""Inside a measuring process: a request comes in, events go out. `labkit.process` and `labkit.workers` start it."""

import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from labkit.errors import LabError


def serve_request(run: Callable[[Mapping[str, Any], Callable[[dict[str, Any]], None]], Any]) -> int:
    """Call ``run(request, emit)`` with the JSON object on standard input; returns the process's exit code.

    Standard output is for events only, one JSON object a line; whatever else is printed goes to standard error.
    An error becomes the event ``{"event": "error", "message": str, "known": bool}``; ``known`` says that the message
    is the lab's own, and that no trace is needed to understand it.
    """
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)

    def emit(event: dict[str, Any]) -> None:
        print(json.dumps(event, ensure_ascii=False), file=channel, flush=True)

    try:
        run(json.loads(sys.stdin.read()), emit)
    except LabError as error:
        emit({"event": "error", "message": str(error), "known": True})
        return 2
    except BrokenPipeError:  # whoever asked has gone away: what is on disk is kept
        return 1
    except Exception as error:
        traceback.print_exc()
        emit({"event": "error", "message": f"{type(error).__name__}: {error}", "known": False})
        return 1
    return 0
