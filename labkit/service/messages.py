"""What a conversation's messages may hold: strict, as all of a request (`labkit.service.schemas`)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator


class Strict(BaseModel):
    """No conversions: "5" is no number, 1.0 no whole number, 1 no truth value."""

    model_config = ConfigDict(strict=True, extra="ignore")


class TextPart(Strict):
    type: Literal["text"]
    text: str


class ImageUrl(Strict):
    url: str = Field(description="a data: URL with base64; others where the service allows them")
    detail: Literal["auto", "low", "high"] | None = Field(None, description="accepted, and changes nothing")


class ImagePart(Strict):
    type: Literal["image_url"]
    image_url: ImageUrl


class InputAudio(Strict):
    data: str = Field(description="base64 of a recording")
    format: Literal["wav", "mp3", "flac", "ogg"] | None = None


class AudioPart(Strict):
    type: Literal["input_audio"]
    input_audio: InputAudio


class RefusalPart(Strict):
    type: Literal["refusal"]
    refusal: str


Part = Annotated[TextPart | ImagePart | AudioPart | RefusalPart, Field(discriminator="type")]
MAX_PARTS = 1024


def kind_of_content(value: Any) -> str | None:
    """Which branch of a field that is a string or a list; None: neither."""
    return {str: "text", list: "parts"}.get(type(value))


Content = Annotated[
    Annotated[str, Tag("text")]
    | Annotated[list[Part], Tag("parts"), Field(min_length=1, max_length=MAX_PARTS)],
    Discriminator(
        kind_of_content,
        custom_error_type="content_type",
        custom_error_message="content is a string or a list of parts",
    ),
]


class FunctionCall(Strict):
    name: str
    arguments: str


class ToolCall(Strict):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class SystemMessage(Strict):
    role: Literal["system", "developer"]
    content: Content


class UserMessage(Strict):
    role: Literal["user"]
    content: Content


class AssistantMessage(Strict):
    model_config = ConfigDict(
        json_schema_extra={
            "anyOf": [
                {"required": ["content"], "properties": {"content": {"type": ["string", "array"]}}},
                {"required": ["tool_calls"], "properties": {"tool_calls": {"type": "array", "minItems": 1}}},
                {"required": ["refusal"], "properties": {"refusal": {"type": "string"}}},
            ]
        }
    )

    role: Literal["assistant"]
    content: Content | None = None
    refusal: str | None = Field(None, description="as content, where there is none")
    tool_calls: list[ToolCall] | None = None
    reasoning_content: str | None = Field(None, description="accepted from earlier answers, and not repeated")

    @model_validator(mode="after")
    def _says_something(self) -> AssistantMessage:
        if self.content is None:
            self.content = self.refusal
        if self.content is None and not self.tool_calls:
            raise ValueError("an assistant's message needs content, a refusal or tool_calls")
        return self


class ToolMessage(Strict):
    role: Literal["tool"]
    content: Content
    tool_call_id: str


Message = Annotated[SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]
ROLES = ("system", "developer", "user", "assistant", "tool")
