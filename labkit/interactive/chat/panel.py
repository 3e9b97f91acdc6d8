"""The panel with the screen that the model sees."""

from pathlib import Path

import gradio as gr
from gradio.data_classes import ImageData
from PIL import Image

from labkit.common.errors import MediaError
from labkit.common.images import load_image


def screen_panel(label: str) -> gr.Image:
    """Gradio's image panel; handlers get what `read_upload` returns."""
    # Gradio's default format, WebP, is lossy: the screen that is asked about would not be the screen that was drawn.
    panel = gr.Image(label=label, format="png", sources=["upload", "clipboard"], height=390, buttons=[])
    # Gradio's own reading turns transparency black and 16 bits white, and fails on a broken file before a handler
    # can say so. No subclass: Gradio writes a stub file beside the module of each.
    panel.preprocess = read_upload
    return panel


def read_upload(payload: ImageData | None) -> Image.Image | MediaError | None:
    """The picture in the panel, None without any, or the reason why it cannot be used."""
    if payload is None:
        return None
    is_url = payload.url is not None and payload.url.startswith("data:")
    try:
        return load_image(
            payload.url if is_url else payload.path,
            f"the image {payload.orig_name or Path(payload.path or '').name}".strip(),
        )
    except MediaError as error:
        return error
