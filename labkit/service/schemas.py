"""What a chat request may hold. Strict: a wrong kind or range is refused; unknown fields are ignored.

The lab's own are ``return_reasoning`` (also vLLM's ``include_reasoning``), ``answer_tags`` and the response format
``{"type": "action"}``.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    ConfigDict,
    Discriminator,
    Field,
    FiniteFloat,
    Tag,
    ValidationError,
    model_validator,
)

from labkit.common.errors import ApiError
from labkit.engine.json_schema import MAX_SCHEMA_DEPTH, is_deeper
from labkit.engine.sampling import MAX_LOGPROBS
from labkit.service.messages import ROLES, Message, Strict, kind_of_content
from labkit.service.options import ALIAS

MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256


class FieldError(ValueError):
    """A field that does not go with another."""

    def __init__(self, field: str, reason: str):
        super().__init__(reason)
        self.field = field


def _shallow(schema: dict[str, Any]) -> dict[str, Any]:
    if is_deeper(schema, MAX_SCHEMA_DEPTH):
        raise ValueError(f"is nested more than {MAX_SCHEMA_DEPTH} levels deep")
    return schema


Schema = Annotated[dict[str, Any], AfterValidator(_shallow)]


class StreamOptions(Strict):
    include_usage: bool | None = None


class TextFormat(Strict):
    type: Literal["text"]


class JsonObjectFormat(Strict):
    type: Literal["json_object"]


class JsonSchema(Strict):
    name: str = Field(min_length=1, max_length=64)
    schema_: Schema = Field(alias="schema")
    strict: bool | None = None
    description: str | None = None


class JsonSchemaFormat(Strict):
    type: Literal["json_schema"]
    json_schema: JsonSchema


class ActionFormat(Strict):
    type: Literal["action"] = Field(description="one action of AutoGLM's syntax; it always parses")


ResponseFormat = Annotated[
    TextFormat | JsonObjectFormat | JsonSchemaFormat | ActionFormat, Field(discriminator="type")
]


class FunctionDefinition(Strict):
    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: Schema | None = None


class Tool(Strict):
    type: Literal["function"]
    function: FunctionDefinition


class FunctionName(Strict):
    name: str


class NamedTool(Strict):
    type: Literal["function"]
    function: FunctionName


def _kind_of_choice(value: Any) -> str | None:
    return {str: "word", dict: "named"}.get(type(value))


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("word")] | Annotated[NamedTool, Tag("named")],
    Discriminator(
        _kind_of_choice,
        custom_error_type="tool_choice",
        custom_error_message="tool_choice is none, auto, required or a named function",
    ),
]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
Stop = Annotated[
    Annotated[StopString, Tag("text")]
    | Annotated[list[StopString], Tag("parts"), Field(max_length=MAX_STOPS)],
    Discriminator(
        kind_of_content,
        custom_error_type="stop_type",
        custom_error_message="stop is a string or a list of strings",
    ),
]


def _goes_with(field: str, kinds: dict[str, Any], other: str) -> dict[str, Any]:
    """For readers of the schema: a field that needs another to be true."""
    return {
        "if": {"required": [field], "properties": {field: kinds}},
        "then": {"required": [other], "properties": {other: {"const": True}}},
    }


class ChatRequest(Strict):
    """The body of ``POST /v1/chat/completions``."""

    model_config = ConfigDict(
        json_schema_extra={
            "allOf": [
                _goes_with("stream_options", {"type": "object"}, "stream"),
                _goes_with("top_logprobs", {"type": "integer", "minimum": 1}, "logprobs"),
            ]
        }
    )

    model: str = Field(description="a name from /v1/models")
    messages: list[Message] = Field(min_length=1, max_length=1024)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    temperature: Annotated[FiniteFloat, Field(ge=0, le=2)] | None = Field(
        None, description="0, the default, takes the likeliest token, as `labkit compare` does"
    )
    top_p: Annotated[FiniteFloat, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = Field(None, description="0 and -1 are off")
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop | None = None
    frequency_penalty: Annotated[FiniteFloat, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[FiniteFloat, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[FiniteFloat, Field(gt=0, le=100)] | None = None
    logit_bias: dict[str, Annotated[FiniteFloat, Field(ge=-100, le=100)]] | None = Field(
        None, max_length=4096
    )
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = Field(None, max_length=128)
    tool_choice: ToolChoice | None = None
    enable_thinking: bool | None = None
    return_reasoning: bool | None = Field(None, description="thinking apart, in reasoning_content")
    include_reasoning: bool | None = Field(None, description="vLLM's name for return_reasoning")
    answer_tags: bool | None = Field(
        None,
        description="leave <answer> tags in the content; by default all names of the model do but autoglm-phone-9b, "
        "whose published clients cannot read an action with a tag behind it",
    )
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="enable_thinking is read")
    timeout: Annotated[FiniteFloat, Field(gt=0)] | None = Field(
        None, description="seconds after which the answer is given up, if sooner than the service's"
    )

    @model_validator(mode="after")
    def _fits_together(self) -> ChatRequest:
        if self.stream_options is not None and not self.stream:
            raise FieldError("stream_options", "goes with stream: true only")
        if self.top_logprobs and not self.logprobs:
            raise FieldError("top_logprobs", "goes with logprobs: true only")
        thinking = (self.chat_template_kwargs or {}).get("enable_thinking")
        if thinking is not None and not isinstance(thinking, bool):
            raise FieldError("chat_template_kwargs.enable_thinking", "is true or false")
        return self

    @property
    def thinks(self) -> bool | None:
        """Whether to think, or None if the request does not say."""
        inner = (self.chat_template_kwargs or {}).get("enable_thinking")
        return self.enable_thinking if self.enable_thinking is not None else inner

    @property
    def wants_json(self) -> bool:
        """Whether the content is to be JSON."""
        return self.response_format is not None and self.response_format.type.startswith("json")

    @property
    def keeps_tags(self) -> bool:
        """Whether ``<answer>`` tags stay in the content; in JSON they are part of a string."""
        if self.wants_json:
            return True
        return self.model != ALIAS if self.answer_tags is None else self.answer_tags

    @property
    def splits_reasoning(self) -> bool:
        """Whether thinking is given apart."""
        asked = (self.return_reasoning, self.include_reasoning)
        return next((entry for entry in asked if entry is not None), False)


def read_request(document: Any) -> ChatRequest:
    """The request in a JSON document.

    Raises:
        ApiError: the first thing that is wrong, with its place; never with what the client sent.
    """
    if not isinstance(document, dict):
        raise ApiError("the body must be a JSON object", code="invalid_type")
    try:
        return ChatRequest.model_validate(document)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        steps = [str(step) for step in first["loc"]]
        kept = [step for at, step in enumerate(steps) if not _is_tag(steps, at)]
        param = ".".join(kept) or getattr(first.get("ctx", {}).get("error"), "field", None)
        reason = first["msg"].removeprefix("Value error, ")
        if first["type"] == "union_tag_invalid":  # pydantic's own words quote what was sent
            reason = f"its {first['ctx']['discriminator']} must be one of {first['ctx']['expected_tags']}"
        raise ApiError(f"{param}: {reason}" if param else reason, param=param, code=first["type"]) from None


def _is_tag(steps: list[str], at: int) -> bool:
    """Whether a step of an error's place names a branch of the schema, which is no field of the document."""
    before, step = steps[at - 1] if at else "", steps[at]
    if steps[0] == "messages" and at == 2:
        return step in ROLES
    if before in ("content", "stop", "tool_choice"):
        return step in ("text", "parts", "word", "named")
    if before == "response_format":
        return step != "type"
    return (
        before.isdigit()
        and "content" in steps[:at]
        and step in ("text", "image_url", "input_audio", "refusal")
    )
