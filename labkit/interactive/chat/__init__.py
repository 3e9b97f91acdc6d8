"""The chat window: text, pictures and speech to one service or to two side by side. No torch.

    from labkit import chat
    chat.build().launch()                                  # in a notebook's cell, or with inbrowser=True in a tab
    chat.build(["http://127.0.0.1:8000/v1", "http://127.0.0.1:8001/v1"]).launch()     # A/B

It talks to services through `labkit.client.Client`: the lab's own (``labkit serve``), or any base URL.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from labkit.client import Reply, data_url, user_message
from labkit.interactive import language as edition
from labkit.interactive.chat.endpoint import Endpoint, stream

if TYPE_CHECKING:
    import gradio

__all__ = ["Endpoint", "Reply", "build", "data_url", "stream", "user_message"]


def build(
    services: Sequence[str | Endpoint] = ("http://127.0.0.1:8000/v1",), language: str | None = None
) -> "gradio.Blocks":
    """Build the window; its ``.launch()`` shows it.

    services: one base URL, or two for A/B; an `Endpoint` sets model and key as well. language: ``en`` or ``zh``, can be
    changed in the window; None: ``zh`` in the course's Chinese edition, else ``en``. Raises LabError for another
    language or number of services.
    """
    from labkit.interactive.chat.window import build_window

    endpoints = [service if isinstance(service, Endpoint) else Endpoint(service) for service in services]
    return build_window(endpoints, language or edition.language())
