"""The panel with the screen that the model sees."""

from abc import ABCMeta
from pathlib import Path

import gradio as gr
from gradio.data_classes import ImageData
from PIL import Image

from labkit.common.errors import MediaError
from labkit.common.images import load_image


def _read(_: gr.Image, payload: ImageData | None) -> Image.Image | MediaError | None:
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


# Gradio's own reading turns transparency black and 16 bits white, and fails on a broken file before a handler can say
# so. Its sessions make components anew from their class, so the class must differ; a class statement would make
# Gradio write a stub file beside this module.
ScreenPanel: type[gr.Image] = ABCMeta.__new__(
    type(gr.Image),
    "ScreenPanel",
    (gr.Image,),
    {"__module__": __name__, "__doc__": _read.__doc__, "is_template": True, "preprocess": _read},
)


def screen_panel(label: str) -> gr.Image:
    """Gradio's image panel; handlers get the picture, None without any, or the reason why it cannot be used."""
    # Gradio's default format, WebP, is lossy: the screen that is asked about would not be the screen that was drawn.
    return ScreenPanel(label=label, format="png", sources=["upload", "clipboard"], height=390, buttons=[])
