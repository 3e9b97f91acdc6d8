"""Talk to a service: text, screens and recordings in, answers and actions out. No torch.

    from labkit.client import Client

    client = Client("http://127.0.0.1:8000/v1")
    reply = client.ask("打开设置", image=screen, thinking=True)
    reply.action, reply.reasoning

`AsyncClient` does the same with ``await``; `labkit.client.langchain` has the model for LangChain.
"""

from labkit.client.client import AsyncClient, AsyncStream, Client, Stream
from labkit.client.parts import audio_part, data_url, image_part, user_message
from labkit.client.reply import Piece, Reply
from labkit.common.errors import ClientError

__all__ = [
    "AsyncClient",
    "AsyncStream",
    "Client",
    "ClientError",
    "Piece",
    "Reply",
    "Stream",
    "audio_part",
    "data_url",
    "image_part",
    "user_message",
]
