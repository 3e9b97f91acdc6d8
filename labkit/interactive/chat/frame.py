"""The window's looks, and the window in a notebook's cell: through Jupyter's own address, for that works in a pod too.

There only Jupyter's port is open, and a frame of ``http://127.0.0.1:7860`` stays empty. jupyter-server-proxy reaches the
window at ``…/proxy/7860/``; Gradio must then name addresses behind that path, whoever asks. `BehindJupyter` tells it, by
the headers that it reads, for those requests only: the local address works as before.
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
    """Blocks that are launched with the chat's looks, and serve several people at a time."""

    def launch(self, *, inline: bool | None = None, **options: Any) -> Any:
        """As `gradio.Blocks.launch`; needs no network. In JupyterLab the cell shows it through Jupyter's address."""
        theme = gr.themes.Default(font=FONTS, font_mono=MONO, primary_hue="blue")
        self.queue(default_concurrency_limit=8)
        looks = {"theme": theme, "css": CSS, "footer_links": []}
        around = {"app_kwargs": {"middleware": [Middleware(BehindJupyter)]}}
        wanted = ipython_check() if inline is None else inline
        path = proxied(1) if wanted else None  # whether there is one: the port is not known yet
        launched = super().launch(inline=wanted and path is None, **{**looks, **around, **options})
        if path is not None:
            show(proxied(self.server_port), self.width, self.height)
        return launched


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
    kept = [
        header for header in headers if header[0].lower() not in (b"x-forwarded-host", b"x-forwarded-proto")
    ]
    place = f"{host}{path.rstrip('/')}"
    return [*kept, (b"x-forwarded-host", place.encode("latin-1")), (b"x-forwarded-proto", scheme.encode())]


DARK = """(() => {
  if (document.body.dataset.jpThemeLight === "false")
    for (const one of document.querySelectorAll(`iframe[src="PATH"]`)) one.src += "?__theme=dark";
})()"""
"""Gradio's dark looks in JupyterLab's dark theme."""


def show(path: str, width: Any, height: Any) -> None:
    """Show what is at a path of Jupyter's address, in the cell that runs; dark where JupyterLab is."""
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
