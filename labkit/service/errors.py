"""Errors as OpenAI's clients read them: ``{"error": {"message", "type", "param", "code"}}`` with a status."""

from __future__ import annotations

from labkit.common.errors import ApiError, LabError, PromptTooLongError

FAILED = "the service failed; its log says more"
"""What a client is told of an error that is not its own."""


def stopping() -> ApiError:
    """What a client is told whose request cannot be finished before the service stops."""
    return ApiError("the service is being stopped", 503, code="stopping", headers={"Connection": "close"})


def as_api_error(error: BaseException, param: str | None = None) -> ApiError:
    """What a client is told of any error: the lab's own in its words, all others as a fault of the service."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, PromptTooLongError):
        return ApiError(str(error), param="messages", code="context_length_exceeded")
    if isinstance(error, LabError):
        return ApiError(str(error), param=param)
    return ApiError(FAILED, 500, code="internal_error")
