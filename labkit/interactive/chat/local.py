"""Starts services on this machine for the chat, each in a process of its own (`labkit.client.launch`)."""

from typing import Any

from labkit.client import launch
from labkit.interactive.chat.endpoint import Endpoint

PLANS = ["int4", "int8", "int8-dynamic", "nf4", "llm-int8", "bf16", "fp32"]
"""Plans that the list offers; the name of any other plan or plan file can be typed."""


def start(model: str, plan: str, port: int = 0) -> tuple[Endpoint, Any]:
    """Start ``labkit serve MODEL --plan PLAN`` on a free port and wait until it answers.

    Returns its endpoint, and the service, whose ``stop()`` ends it. Raises LabError with the end of its log.
    """
    service = launch.start(model, plan, port=port, show=None)
    return Endpoint(service.base_url), service
