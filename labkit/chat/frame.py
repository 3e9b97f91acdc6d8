"""The window in a notebook's cell: through Jupyter's own address, so that it works in a pod too.

There only Jupyter's port is open, and a frame of ``http://127.0.0.1:7860`` stays empty. jupyter-server-proxy reaches the
window at ``…/proxy/7860/``; Gradio must then name addresses behind that path, whoever asks. `BehindJupyter` tells it, by
the headers that it reads, for those requests only: the local address works as before.
"""

from __future__ import annotations

import html
from typing import Any
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Receive, Scope, Send

ALLOWED = "autoplay; microphone; clipboard-read; clipboard-write"


class BehindJupyter:
    """ASGI middleware: what jupyter-server-proxy says of the path, in the headers that Gradio reads."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the class."""
        if scope["type"] == "http":
            scope = {**scope, "headers": _with_path(scope["headers"])}
        await self._app(scope, receive, send)


def _with_path(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    known = {name.lower(): value.decode("latin-1") for name, value in headers}
    path, host = known.get(b"x-forwarded-prefix", ""), known.get(b"host", "")
    if not path.startswith("/") or not host:
        return headers
    # TLS ends before Jupyter: the page that asks knows best how it was reached.
    referrer = urlsplit(known.get(b"origin") or known.get(b"referer", ""))
    scheme = referrer.scheme if referrer.netloc == host else known.get(b"x-forwarded-proto", "http")
    kept = [one for one in headers if one[0].lower() not in (b"x-forwarded-host", b"x-forwarded-proto")]
    place = f"{host}{path.rstrip('/')}"
    return [*kept, (b"x-forwarded-host", place.encode("latin-1")), (b"x-forwarded-proto", scheme.encode())]


def show(path: str, width: Any, height: Any) -> None:
    """Show what is at a path of Jupyter's address, in the cell that runs."""
    from IPython.display import HTML, display

    size = f'width="{html.escape(str(width))}" height="{html.escape(str(height))}"'
    address = html.escape(path)
    display(
        HTML(
            f'<iframe src="{address}" {size} allow="{ALLOWED}" frameborder="0" allowfullscreen></iframe>'
            f'<p><a href="{address}" target="_blank">In a tab of its own</a></p>'
        )
    )
