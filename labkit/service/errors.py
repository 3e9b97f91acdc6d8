"""Errors as OpenAI's clients read them: ``{"error": {"message", "type", "param", "code"}}`` with a status."""

from __future__ import annotations

from labkit.common.errors import ApiError, LabError, PromptTooLongError

FAILED = "the service failed; its log says more"
"""What a client is told of an error that is not its own."""


def as_api_error(error: BaseException, param: str | None = None) -> ApiError:
    """What a client is told of any error: the lab's own in its words, all others as a fault of the service."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, PromptTooLongError):
        return ApiError(str(error), param="messages", code="context_length_exceeded")
    if isinstance(error, LabError):
        return ApiError(str(error), param=param)
    return ApiError(FAILED, 500, code="internal_error")
