"""The lab's errors: a tree with a class for each error that some code catches.

LabError                 a request that cannot be fulfilled; the command line exits with code 2
├── ActionSyntaxError    a text is not an action
├── AllocationError      no plan fits the budget
├── ApiError             an error response to a client of the service, with its HTTP status
├── CheckpointError      a quantized folder is damaged, changed, or unsuitable
├── ClientError          a service refuses, fails, or is not there
├── GrammarError         a grammar that cannot be used
├── LaunchError          a service that cannot be started, or has failed
├── LoadError            a model that cannot be loaded as requested
│   └── HubError         a model on the hub that cannot be read
├── MediaError           an image or a recording that cannot be used
├── NativeError          no compiled library on this machine
├── PlanError            a plan that is impossible, or does not fit the model
├── PromptTooLongError   a prompt that leaves no room in the context
├── ResultsError         a results file that is missing, damaged or malformed
├── SchemeError          a scheme or a scheme option that is not possible
├── ScreenError          a screen that cannot be drawn
└── WorkerFailedError    a measuring process that failed
Interrupted              Ctrl-C (a KeyboardInterrupt): finished measurements are on disk
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any


class LabError(ValueError):
    """A request of the user cannot be fulfilled.

    The message names the mistake and the remedy, in one line. Any other exception that escapes is a bug.
    """


class Interrupted(KeyboardInterrupt):
    """Ctrl-C: finished measurements are on disk, and the same call continues from there.

    Attributes:
        partial: the finished part of the result, if the call provides it (`compare`: its `Comparison`).
    """

    def __init__(self, message: str, partial: Any = None) -> None:
        super().__init__(message)
        self.partial = partial


class ResultsError(LabError):
    """A results file is missing, damaged or malformed; the message names the file and the place."""


class CheckpointError(LabError):
    """A quantized checkpoint is damaged or changed, or cannot be used as requested."""


class LoadError(LabError):
    """A model cannot be loaded as requested."""


class ActionSyntaxError(LabError):
    """A text is not an action in AutoGLM's syntax; the message gives the reason."""


class AllocationError(LabError):
    """No plan fits the budget."""


class ClientError(LabError):
    """A service refuses, fails, or is not there.

    Attributes:
        status: the HTTP status, or None without an answer.
        param, code: the fields of the service's error.
        retry_after_s: the seconds that a busy service asks the client to wait, or None.
    """

    def __init__(
        self,
        message: str,
        status: int | None = None,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ):
        super().__init__(message)
        self.status, self.param, self.code, self.retry_after_s = status, param, code, retry_after_s


class GrammarError(LabError):
    """A grammar cannot be used: its schema is invalid, or the tokenizer cannot write its text."""


class HubError(LoadError):
    """A model on the hub that cannot be read."""


class LaunchError(LabError):
    """A service that cannot be started, or has failed."""


class MediaError(LabError):
    """An image or a recording that cannot be used."""


class NativeError(LabError):
    """There is no compiled library on this machine; the message gives the reason."""


class PlanError(LabError):
    """A plan is impossible, or does not fit the model."""


class PromptTooLongError(LabError):
    """A prompt that leaves no room in the model's context."""


class SchemeError(LabError):
    """A scheme or a scheme option is not possible, or not for this Linear."""


class ScreenError(LabError):
    """The requested screen cannot be drawn."""


class WorkerFailedError(LabError):
    """The measuring process failed; the message comes from it, or points to its log."""


class ApiError(LabError):
    """The error response to a client.

    Args:
        message: the mistake and the remedy, without paths, prompts or tracebacks.
        status: the HTTP status.
        param: the wrong field, such as ``messages.0.content``.
        code: a machine-readable code.
        headers: further response headers.
    """

    _TYPES = MappingProxyType({401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"})

    def __init__(
        self,
        message: str,
        status: int = 400,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.message = " ".join(str(message).split())
        self.status, self.param, self.code = status, param, code
        self.headers = dict(headers or {})

    @property
    def type(self) -> str:
        """OpenAI's kind of error."""
        default = "server_error" if self.status >= 500 else "invalid_request_error"
        return self._TYPES.get(self.status, default)

    def body(self) -> dict[str, Any]:
        """The JSON body."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}
