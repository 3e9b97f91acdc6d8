"""What a service can be told: one frozen dataclass; the command line's help reads its fields. No torch."""

from __future__ import annotations

import dataclasses
import ipaddress
import math
import re
from dataclasses import dataclass, field
from typing import Any

from labkit.common.errors import LabError

API_KEY_VARIABLE = "LABKIT_API_KEY"
ALIAS = "autoglm-phone-9b"
"""What published clients of AutoGLM call the model; every service answers to it."""


def _option(default: Any, help: str, metavar: str = "N") -> Any:
    return field(default=default, metadata={"help": help, "metavar": metavar})


@dataclass(frozen=True)
class ServiceOptions:
    """How a service behaves; every field's help is in its metadata (`help_of`)."""

    host: str = _option("127.0.0.1", "address to listen on; 0.0.0.0 is every one of this machine", "ADDRESS")
    port: int = _option(8000, "port to listen on")
    streams: int = _option(8, "most answers that are generated at a time")
    queue: int = _option(32, "most answers that wait for their turn; further requests get status 429")
    max_tokens: int = _option(1024, "longest answer of a request that does not say")
    timeout_s: float = _option(300.0, "seconds after which an answer is given up", "S")
    grace_s: float = _option(30.0, "seconds that running answers get when the service is stopped", "S")
    stuck_s: float = _option(120.0, "seconds without a token after which /health says stuck", "S")
    body_s: float = _option(60.0, "seconds that a client may take to send its request", "S")
    max_body_bytes: int = _option(32 * 2**20, "largest body of a request, in bytes")
    max_images: int = _option(10, "most images in one request")
    max_recordings: int = _option(10, "most recordings in one request")
    max_choices: int = _option(8, "most answers to one request (its parameter n)")
    thinking: bool = _option(False, "think where a request does not say (enable_thinking)")
    allow_remote_images: bool = _option(
        False, "fetch image_urls of http and https; never from private addresses"
    )
    api_key: str | None = field(
        default=None,
        repr=False,
        metadata={
            "help": f"key that clients must send as a bearer token (also from ${API_KEY_VARIABLE})",
            "metavar": "KEY",
        },
    )
    served_name: str | None = _option(None, "name that clients call the model by, besides its own", "NAME")
    cors_origin: str | None = _option(None, "web page that may call the service from a browser", "ORIGIN")

    def __post_init__(self):
        counts = ("streams", "max_tokens", "max_body_bytes", "max_choices")
        for name in (*counts, "queue", "max_images", "max_recordings"):
            value, least = getattr(self, name), int(name in counts)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise LabError(f"{name} is {value!r}; expected a whole number from {least}")
        for name in ("timeout_s", "grace_s", "stuck_s", "body_s"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
                raise LabError(f"{name} is {value!r}; expected a number of seconds above 0")
        if not isinstance(self.port, int) or not 0 <= self.port <= 65535:
            raise LabError(f"port is {self.port!r}; expected 0 (any free one) to 65535")
        if self.api_key is not None and not re.fullmatch(r"[\x21-\x7e]+", self.api_key):
            raise LabError("the API key must be visible ASCII characters without spaces")

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach the service."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def help_of(name: str) -> tuple[str, str, Any]:
    """Help, metavar and default of one option."""
    found = next(one for one in dataclasses.fields(ServiceOptions) if one.name == name)
    return found.metadata["help"], found.metadata["metavar"], found.default
