"""The options of a service and of its engine, frozen dataclasses whose help the command line reads. No torch."""

from __future__ import annotations

import ipaddress
import math
import os
import re
import socket
from dataclasses import dataclass

from labkit.common.errors import LabError
from labkit.common.options import option

ENGINES = ("labkit", "vllm")
API_KEY_VARIABLE = "LABKIT_API_KEY"
JUPYTER_VARIABLES = ("JPY_PARENT_PID", "JUPYTER_SERVER_ROOT", "JUPYTERHUB_SERVICE_PREFIX")
"""What Jupyter sets for its kernels and terminals; its proxy hands on the name that a browser called Jupyter by."""
ALIAS = "autoglm-phone-9b"
"""What published clients of AutoGLM call the model; every service answers to it."""


@dataclass(frozen=True)
class ServiceOptions:
    """How a service behaves."""

    host: str = option(
        "127.0.0.1", "address to listen on; 0.0.0.0 is every one of this machine", metavar="ADDRESS"
    )
    port: int = option(8000, "port to listen on; 0: any free one", least=0, most=65535)
    streams: int = option(8, "most answers that are generated at a time", least=1)
    queue: int = option(32, "most answers that wait for their turn; further requests get status 429", least=0)
    max_tokens: int = option(1024, "longest answer of a request that does not say", least=1)
    timeout_s: float = option(300.0, "seconds after which an answer is given up", metavar="S")
    grace_s: float = option(30.0, "seconds that running answers get when the service is stopped", metavar="S")
    stuck_s: float = option(120.0, "seconds without a token after which /health says stuck", metavar="S")
    headers_s: float = option(10.0, "seconds that a client may take to send a request's headers", metavar="S")
    body_s: float = option(60.0, "seconds that a client may take to send a request's body", metavar="S")
    max_connections: int = option(
        512, "most connections; fewer where the process may not open so many files", least=1
    )
    max_body_bytes: int = option(
        32 * 2**20, "largest body of a request, in bytes; all together may have eight times as many", least=1
    )
    max_pixels: int = option(
        60_000_000,
        "most pixels of the images in one request, and of all that are being decoded; others wait",
        least=1,
    )
    max_images: int = option(10, "most images in one request", least=0)
    max_recordings: int = option(10, "most recordings in one request", least=0)
    max_choices: int = option(8, "most answers to one request (its parameter n)", least=1)
    thinking: bool = option(False, "think where a request does not say (enable_thinking)")
    allow_remote_images: bool = option(
        False, "fetch image_urls of http and https; never from private addresses"
    )
    allowed_hosts: str | None = option(
        None,
        "names that clients may call this machine by (HTTP's Host header), separated by commas, or *; by default "
        "localhost and this machine's own name where only this machine is listened to, outside Jupyter; else any",
        metavar="NAMES",
    )
    api_key: str | None = option(
        None,
        f"key that clients must send as a bearer token (also from ${API_KEY_VARIABLE})",
        metavar="KEY",
        repr=False,
    )
    served_name: str | None = option(
        None, "name that clients call the model by, besides its own", metavar="NAME"
    )
    cors_origin: str | None = option(
        None, "web page that may call the service from a browser", metavar="ORIGIN"
    )

    def __post_init__(self):
        counts = (
            "streams", "max_tokens", "max_connections", "max_body_bytes", "max_pixels", "max_choices",
        )  # fmt: skip
        for name in (*counts, "queue", "max_images", "max_recordings"):
            value, least = getattr(self, name), int(name in counts)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise LabError(f"{name} is {value!r}; expected a whole number from {least}")
        for name in ("timeout_s", "grace_s", "stuck_s", "headers_s", "body_s"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
                raise LabError(f"{name} is {value!r}; expected a number of seconds above 0")
        if not isinstance(self.port, int) or not 0 <= self.port <= 65535:
            raise LabError(f"port is {self.port!r}; expected 0 (any free one) to 65535")
        if self.api_key is not None and not re.fullmatch(r"[\x21-\x7e]+", self.api_key):
            raise LabError("the API key must be visible ASCII characters without spaces")

    @property
    def host_names(self) -> tuple[str, ...] | None:
        """What HTTP's Host header may name besides numeric addresses; None: anything.

        A web page can point its own name at this machine (DNS rebinding) and then ask the service as its own server;
        its name is what tells it from a local client.
        """
        if self.allowed_hosts is not None:
            names = tuple(name.strip().lower() for name in self.allowed_hosts.split(",") if name.strip())
            return None if "*" in names else ("localhost", *names)
        if not self.is_local or any(name in os.environ for name in JUPYTER_VARIABLES):
            return None
        return ("localhost", socket.gethostname().lower())

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach the service."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


@dataclass(frozen=True)
class EngineOptions:
    """What generates the answers; the rest is vLLM's alone."""

    engine: str = option("labkit", "what generates: the lab's engine, or vLLM", ENGINES)
    tensor_parallel_size: int = option(1, "with vLLM: GPUs that share each layer of the model", least=1)
    pipeline_parallel_size: int = option(
        1, "with vLLM: machines that share the layers of the model, over its Ray back end", least=1
    )
    vllm_args: str = option(
        "",
        "further arguments for vLLM in one string: --vllm-args='--enforce-eager --swap-space 4'",
        metavar="ARGUMENTS",
    )

    def __post_init__(self):
        if self.engine == "labkit" and (
            self.tensor_parallel_size > 1 or self.pipeline_parallel_size > 1 or self.vllm_args
        ):
            raise LabError(
                "parallel sizes and --vllm-args need --engine vllm; the lab's engine puts its layers on several "
                "GPUs by --device cuda:0,cuda:1"
            )
