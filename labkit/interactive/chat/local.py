"""Services of this machine, started for the chat: through `labkit.client.launch`, never in this process."""

from typing import Any

from labkit.client import launch
from labkit.interactive.chat.endpoint import Endpoint

PLANS = ["int4", "int8", "int8-dynamic", "nf4", "llm-int8", "bf16", "fp32"]
"""Plans to choose from at first; the name of any other, or of a file, may be written."""


def start(model: str, plan: str, port: int = 0) -> tuple[Endpoint, Any]:
    """Start ``labkit serve MODEL --plan PLAN`` on a free port and wait until it answers.

    Returns where it is, and the service, whose ``stop()`` ends it. Raises LabError with its log's last words.
    """
    service = launch.start(model, plan, port=port, show=None)
    return Endpoint(service.base_url), service
