"""The chat window's theme, and the window in a notebook cell through Jupyter's own address.

In a pod only Jupyter's port is open: jupyter-server-proxy serves the window at ``…/proxy/7860/``.
"""

from __future__ import annotations

import html
from typing import Any
from urllib.parse import urlsplit

import gradio as gr
from gradio.utils import ipython_check
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

from labkit.client.launch.proxy import proxied
from labkit.interactive import language

FONTS = ["system-ui", "-apple-system", "Segoe UI", "Noto Sans", "Noto Sans SC", "sans-serif"]
MONO = ["ui-monospace", "Menlo", "Consolas", "monospace"]
CSS = ".labkit-narrow {min-width: 250px !important} button[aria-label='Share'] {display: none}"
"""Gradio's sharing of pictures would send them to a site of its own choice."""
ALLOWED = "autoplay; microphone; clipboard-read; clipboard-write"


class ChatBlocks(gr.Blocks):
    """Blocks with the chat's theme, for several users at a time."""

    def launch(self, *, inline: bool | None = None, **options: Any) -> Any:
        """As `gradio.Blocks.launch`; needs no network. In JupyterLab the cell shows the window through Jupyter's address."""
        theme = gr.themes.Default(font=FONTS, font_mono=MONO, primary_hue="blue")
        self.queue(default_concurrency_limit=8)
        looks = {"theme": theme, "css": CSS, "footer_links": []}
        around = {"app_kwargs": {"middleware": [Middleware(BehindJupyter)]}}
        in_cell = ipython_check() if inline is None else inline
        path = proxied(1) if in_cell else None  # only whether a proxy exists: the port is chosen at launch
        launched = super().launch(inline=in_cell and path is None, **{**looks, **around, **options})
        if path is not None:
            show(proxied(self.server_port), self.width, self.height)
        return launched


class BehindJupyter:
    """ASGI middleware: copies the proxy's path into the headers from which Gradio builds its addresses.

    Requests that do not come through jupyter-server-proxy pass unchanged, so the local address works as well.
    """

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the class."""
        if scope["type"] == "http":
            scope = {**scope, "headers": _with_path(scope["headers"])}
        await self._app(scope, receive, send)


def _with_path(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    values = {name.lower(): value.decode("latin-1") for name, value in headers}
    path, host = values.get(b"x-forwarded-prefix", ""), values.get(b"host", "")
    if not path.startswith("/") or not host:
        return headers
    # TLS ends before Jupyter, so the page's own origin tells the scheme.
    referrer = urlsplit(values.get(b"origin") or values.get(b"referer", ""))
    scheme = referrer.scheme if referrer.netloc == host else values.get(b"x-forwarded-proto", "http")
    others = [
        header for header in headers if header[0].lower() not in (b"x-forwarded-host", b"x-forwarded-proto")
    ]
    place = f"{host}{path.rstrip('/')}"
    return [*others, (b"x-forwarded-host", place.encode("latin-1")), (b"x-forwarded-proto", scheme.encode())]


DARK = """(() => {
  if (document.body.dataset.jpThemeLight === "false")
    for (const frame of document.querySelectorAll(`iframe[src="PATH"]`)) frame.src += "?__theme=dark";
})()"""
"""Switches Gradio to its dark theme where JupyterLab is dark."""


def show(path: str, width: Any, height: Any) -> None:
    """Show a path of Jupyter's address as a frame in the running cell; dark where JupyterLab is dark."""
    from IPython.display import HTML, display

    size = f'width="{html.escape(str(width))}" height="{html.escape(str(height))}"'
    address = html.escape(path)
    link = "在单独的标签页里打开" if language.language() == "zh" else "In a tab of its own"
    display(
        HTML(
            f'<iframe src="{address}" {size} allow="{ALLOWED}" frameborder="0" allowfullscreen></iframe>'
            f'<p><a href="{address}" target="_blank">{link}</a></p>'
            f"<script>{DARK.replace('PATH', address)}</script>"
        )
    )
