"""The lab's errors: one tree, of which a class of its own is only what somebody catches.

LabError                 whatever the user asked for and cannot have; the command line exits with code 2
├── ActionSyntaxError    a text is no action
├── AllocationError      no plan fits the budget
├── ApiError             what a client of the service is told, with its HTTP status
├── CheckpointError      a quantized folder is damaged, changed, or not for this use
├── ClientError          a service refuses, fails, or is not there
├── GrammarError         a grammar that cannot be used
├── LaunchError          a service that cannot be started, or has failed
├── LoadError            a model that cannot be loaded as asked
│   └── HubError         a model on the hub that cannot be read
├── MediaError           an image or a recording that cannot be used
├── NativeError          no compiled library here
├── PlanError            a plan that is impossible, or does not fit the model
├── PromptTooLongError   a prompt that leaves no room in the context
├── ResultsError         a results file that is missing, damaged or of another shape
├── RunFolderError       an output folder that cannot be used
├── SchemeError          a scheme or an option of it that is not possible
├── ScreenError          a screen that cannot be drawn
└── WorkerFailedError    a measuring process that failed
Interrupted              Ctrl-C (a KeyboardInterrupt): what was measured is on disk
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any


class LabError(ValueError):
    """Something the user asked for cannot be done.

    The message names what was wrong and what would be right, in one line. Anything else that escapes is a bug of
    the lab.
    """


class Interrupted(KeyboardInterrupt):
    """Ctrl-C: what was measured is on disk, and the same call again continues.

    Attributes:
        partial: what is finished, where the call has something to show of it (`compare`: its `Comparison`).
    """

    def __init__(self, message: str, partial: Any = None) -> None:
        super().__init__(message)
        self.partial = partial


class ResultsError(LabError):
    """A results file is missing, damaged or of another shape; the message says which and where."""


class CheckpointError(LabError):
    """A quantized checkpoint that is damaged, was changed, or cannot be used as asked."""


class LoadError(LabError):
    """A model that cannot be loaded as asked."""


class ActionSyntaxError(LabError):
    """A text is no action in AutoGLM's syntax; the message says why."""


class AllocationError(LabError):
    """No plan fits the budget."""


class ClientError(LabError):
    """A service that refuses, fails, or is not there.

    Attributes:
        status: the HTTP status, or None if there was no answer.
        param, code: as the service says.
        retry_after_s: seconds after which a busy service wants to be asked again, or None.
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
    """A grammar that cannot be used: a broken schema, or too few tokens for it."""


class HubError(LoadError):
    """A model on the hub that cannot be read."""


class LaunchError(LabError):
    """A service that cannot be started, or has failed."""


class MediaError(LabError):
    """An image or a recording that cannot be used."""


class NativeError(LabError):
    """Why there is no compiled library here."""


class PlanError(LabError):
    """A plan that says something impossible, or that does not fit the model."""


class PromptTooLongError(LabError):
    """A prompt that leaves no room in the model's context."""


class RunFolderError(LabError):
    """The output folder cannot be used; the message says why and what to do."""


class SchemeError(LabError):
    """A scheme, an option of one, or a Linear it was asked to replace is not possible."""


class ScreenError(LabError):
    """A screen was asked for that cannot be drawn."""


class WorkerFailedError(LabError):
    """The measuring process failed; the message is its own, or points to its log."""


class ApiError(LabError):
    """What a client is told instead of an answer.

    Args:
        message: what is wrong and what would be right; no paths, prompts or traces.
        status: the HTTP status.
        param: the field that is wrong, as ``messages.0.content``.
        code: a word for programs.
        headers: further headers of the response.
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
