"""Errors as OpenAI's clients read them: ``{"error": {"message", "type", "param", "code"}}`` with a status."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from labkit.common.errors import LabError
from labkit.engine.generation import PromptTooLongError

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(LabError):
    """What a client is told instead of an answer.

    Args:
        message: what is wrong and what would be right; no paths, prompts or traces.
        status: the HTTP status.
        param: the field that is wrong, as ``messages.0.content``.
        code: a word for programs.
        headers: further headers of the response.
    """

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
        return _TYPES.get(self.status, default)

    def body(self) -> dict[str, Any]:
        """The JSON body."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


def as_api_error(error: Exception, param: str | None = None) -> ApiError:
    """What a client is told of any error: the lab's own in its words, all others as a fault of the service."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, PromptTooLongError):
        return ApiError(str(error), param="messages", code="context_length_exceeded")
    if isinstance(error, LabError):
        return ApiError(str(error), param=param)
    return ApiError("the service failed; its log says more", 500, code="internal_error")
