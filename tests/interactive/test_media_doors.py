"""Each picture and recording comes out the same through every door: engine, service, vLLM, client, chat, ``ask``."""

import argparse
import base64
import io
import struct
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
from gradio.data_classes import ImageData
from PIL import Image

import labkit.loading.load
import labkit.measure.job
from labkit.cli import ask
from labkit.cli.main import build_parser
from labkit.client import audio_part, image_part, user_message
from labkit.common.errors import MediaError
from labkit.common.images import load_image
from labkit.common.messages import load_media, normalise_messages
from labkit.common.recordings import load_audio
from labkit.interactive import chat
from labkit.interactive.chat import window
from labkit.service.conversation import lab_messages
from labkit.service.options import ServiceOptions
from labkit.service.schemas import read_request
from labkit.service.vllm.request import translated

RAMP = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (8, 1))
RED = (255, 0, 0)


def saved(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def grey(array, kind="TIFF", **options):
    return saved(Image.fromarray(array), kind, **options)


def png(depth, colour, row, clear):
    """A PNG of 8 x 8 pixels with a transparent colour (tRNS), at any depth."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, depth, colour, 0, 0, 0))
    lines = chunk(b"IDAT", zlib.compress(8 * (b"\0" + row)))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"tRNS", clear) + lines + chunk(b"IEND", b"")


def turned(kind):
    """Red on the left as stored, on top when upright."""
    image = Image.new("RGB", (64, 32), "blue")
    image.paste(RED, (0, 0, 32, 32))
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(image, kind, exif=exif)


def animated():
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    return saved(frames[0], "GIF", save_all=True, append_images=frames[1:])


def palette():
    image = Image.new("P", (16, 16), 0)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.paste(1, (0, 0, 8, 16))
    return saved(image, "PNG", transparency=bytes([255, 0]))


# name -> file, mean of all pixels
PICTURES = {
    "clear.png": (saved(Image.new("RGBA", (16, 16), (0, 0, 0, 0)), "PNG"), 255),
    "grey-1-clear.png": (png(1, 0, b"\0", b"\0\0"), 255),
    "grey-2-clear.png": (png(2, 0, b"\x55\x55", b"\0\1"), 255),
    "grey-4-clear.png": (png(4, 0, b"\x77" * 4, b"\0\7"), 255),
    "grey-8-clear.png": (png(8, 0, b"\x07" * 8, b"\0\7"), 255),
    "grey-16-clear.png": (png(16, 0, b"\1\x2c" * 8, b"\1\x2c"), 255),
    "grey-16-other.png": (png(16, 0, b"\0\0" * 8, b"\1\x2c"), 0),
    "rgb-8-clear.png": (png(8, 2, b"\0" * 24, bytes(6)), 255),
    "rgb-16-clear.png": (png(16, 2, b"\1\x2c" * 24, b"\1\x2c" * 3), 255),
    "palette.png": (palette(), (255 + 170) / 2 - 42.5),
    "clear.webp": (saved(Image.new("RGBA", (16, 16), (0, 0, 0, 0)), "WEBP", lossless=True), 255),
    "clear.gif": (saved(Image.new("P", (16, 16), 0), "GIF", transparency=0), 255),
    "grey-16.png": (grey(RAMP, "PNG"), 127.5),
    "grey-16.tif": (grey(RAMP), 127.5),
    "grey-32.tif": (grey(RAMP.astype(np.int32)), 127.5),
    "grey-8-in-32.tif": (grey((RAMP >> 8).astype(np.int32)), 127.5),
    "float.tif": (grey((RAMP / 65535).astype(np.float32)), 127.5),
    "float-255.tif": (grey((RAMP / 257).astype(np.float32)), 127.5),
    "grey-16.pgm": (b"P5\n64 8\n65535\n" + RAMP.astype(">u2").tobytes(), 127.5),
    "dark-16.pgm": (b"P5\n64 8\n65535\n" + (RAMP // 256).astype(">u2").tobytes(), 0),
    "grey-10.pgm": (b"P5\n64 8\n1023\n" + (RAMP >> 6).astype(">u2").tobytes(), 127.5),
    "float.pfm": (b"Pf\n64 8\n-1.0\n" + (RAMP / 65535).astype("<f4").tobytes(), 127.5),
    "inverted-16.tif": (grey(np.full((8, 8), 65535, np.uint16), tiffinfo={262: 0}), 0),
    "turned-16.tif": (grey(RAMP, tiffinfo={274: 6}), 127.5),
    "cmyk.jpg": (saved(Image.new("CMYK", (16, 16), (0, 0, 0, 255)), "JPEG"), 0),
    "screen.jfif": (saved(Image.new("RGB", (16, 16), "white"), "JPEG"), 255),
    "screen.avif": (saved(Image.new("RGB", (16, 16), "white"), "AVIF"), 255),
    "screen": (saved(Image.new("RGB", (16, 16), "white"), "PNG"), 255),
    "screen.wav": (saved(Image.new("RGB", (16, 16), "white"), "PNG"), 255),
    "turned.jpg": (turned("JPEG"), 85),
    "turned.tif": (turned("TIFF"), 85),
    "turned.png": (turned("PNG"), 85),
    "animated.gif": (animated(), 85),
}

TIME = np.arange(16_000) / 16_000
TONE = (0.3 * np.sin(2 * np.pi * 440 * TIME)).astype(np.float32)


def wav(samples, subtype="FLOAT", kind="WAV"):
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, 16_000, format=kind, subtype=subtype)
    return buffer.getvalue()


def streamed(size, *, both=True):
    """A WAV that a program wrote into a pipe: its header has no sizes."""
    data = bytearray(wav(TONE, "PCM_16"))
    if both:
        data[4:8] = struct.pack("<I", size)
    place = data.index(b"data")
    data[place + 4 : place + 8] = struct.pack("<I", size)
    return bytes(data)


# name -> file, expected samples
RECORDINGS = {
    "plain.wav": (wav(TONE), TONE),
    "loud.wav": (wav(10 * TONE), 10 * TONE),
    "double.wav": (wav(10 * TONE, "DOUBLE"), 10 * TONE),
    "streamed.wav": (streamed(0), TONE),
    "streamed-data.wav": (streamed(0, both=False), TONE),
    "streamed-ff.wav": (streamed(2**32 - 1), TONE),
    "opposite.wav": (wav(np.stack([TONE, -TONE], 1)), TONE),
    "nearly-opposite.wav": (wav(np.stack([0.98 * TONE, -TONE], 1)), -TONE),
    "left.wav": (wav(np.stack([TONE, 0 * TONE], 1)), TONE / 2),
    "stereo.wav": (wav(np.stack([TONE, TONE], 1)), TONE),
    "one-of-eight.wav": (wav(np.stack([TONE] + 7 * [0 * TONE], 1)), TONE / 8),
    "tone.aiff": (wav(TONE, "PCM_24", "AIFF"), TONE),
    "tone.png": (wav(TONE, "PCM_16"), TONE),
    "tone": (wav(TONE, "PCM_16", "FLAC"), TONE),
}


def media_of(message):
    [part] = message["content"] if len(message["content"]) == 1 else message["content"][:1]
    return part[part["type"]]


def through_service(part):
    request = read_request({"model": "m", "messages": [{"role": "user", "content": [part]}]})
    return media_of(lab_messages(request.messages, {})[0])


def through_vllm(part):
    document = {"model": "m", "messages": [{"role": "user", "content": [part]}]}
    request = read_request(document)
    body = translated(request, document, ServiceOptions(), lab_messages(request.messages, {}))
    return media_of(normalise_messages(body["messages"])[0])


def through_ask(monkeypatch, *words):
    asked = []

    class Stream(list):
        generation = SimpleNamespace(
            completion_tokens=1, ttft_s=1.0, decode_tokens_per_s=None, finish_reason="stop"
        )

    def load(*_, **__):
        return SimpleNamespace(stream=lambda messages, **_: asked.extend(messages) or Stream())

    monkeypatch.setattr(labkit.loading.load, "load", load)
    monkeypatch.setattr(labkit.measure.job, "check_senses", lambda *_: None)
    options = build_parser().parse_args(["ask", "pocket", *words, "open it"])
    assert isinstance(options, argparse.Namespace)
    ask.run(options)
    return media_of(normalise_messages(asked)[0])


@pytest.fixture(scope="module")
def parts():
    return window.Window([chat.Endpoint("http://127.0.0.1:1/v1", "m")], "en").parts


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_the_same_through_every_door(name, parts, tmp_path, monkeypatch):
    data, mean = PICTURES[name]
    (path := tmp_path / name).write_bytes(data)
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    as_sent = [image_part(path), image_part(data), image_part(Image.open(io.BytesIO(data))), image_part(url)]
    panel = parts["screen"]
    anew = type(panel)(**panel.constructor_args)  # as Gradio makes it in each session
    shown = anew.preprocess(ImageData(path=str(path), orig_name=name))
    doors = {
        "bytes": load_image(data),
        "PIL": load_image(Image.open(io.BytesIO(data))),
        "content": load_media(path),
        "engine": media_of(normalise_messages([{"role": "user", "content": [{"type": "image", "image": path}]}])[0]),
        "text box": window._attached([str(path)])[0],
        "panel": shown,
        "panel as built": panel.preprocess(ImageData(path=str(path), orig_name=name)),
        "panel again": load_image(anew.postprocess(shown).path),
        "ask": through_ask(monkeypatch, "--image", str(path)),
        **{f"service {index}": through_service(part) for index, part in enumerate(as_sent)},
        "vllm": through_vllm(as_sent[0]),
        "user message": media_of(normalise_messages([user_message(image=path)])[0]),
    }  # fmt: skip
    expected = load_image(path)
    assert np.asarray(expected).mean() == pytest.approx(mean, abs=1)
    for door, picture in doors.items():
        assert picture.mode == "RGB", door
        assert np.array_equal(np.asarray(picture), np.asarray(expected)), door


def test_a_turned_picture_is_upright():
    for kind in ("JPEG", "PNG", "TIFF"):
        picture = load_image(turned(kind))
        assert picture.size == (32, 64)
        assert picture.getpixel((16, 8))[0] > 200 > 50 > picture.getpixel((16, 56))[0]


@pytest.mark.parametrize("name", RECORDINGS)
def test_a_recording_is_the_same_through_every_door(name, tmp_path, monkeypatch):
    data, expected = RECORDINGS[name]
    (path := tmp_path / name).write_bytes(data)
    as_sent = [audio_part(path), audio_part(data), audio_part(load_audio(path))]
    doors = {
        "bytes": load_audio(data),
        "content": load_media(path),
        "engine": media_of(normalise_messages([{"role": "user", "content": [{"type": "audio", "audio": path}]}])[0]),
        "text box": window._attached([str(path)])[1],
        "ask": through_ask(monkeypatch, "--audio", str(path)),
        **{f"service {index}": through_service(part) for index, part in enumerate(as_sent)},
        "vllm": through_vllm(as_sent[0]),
        "user message": media_of(normalise_messages([user_message(audio=path)])[0]),
    }  # fmt: skip
    assert np.allclose(load_audio(path), expected, atol=1e-3)
    for door, samples in doors.items():
        assert np.array_equal(samples, load_audio(path)), door


@pytest.mark.parametrize("kind", [np.uint8, np.int8, np.int16, np.int32, np.float16, np.float64])
def test_an_array_is_the_same_through_the_client_and_the_engine(kind):
    top = np.iinfo(kind).max if np.issubdtype(kind, np.integer) else 1
    samples = (TONE * top + (top / 2 if kind == np.uint8 else 0)).astype(kind)
    for array in (samples, np.stack([samples, samples], 1)):
        assert np.array_equal(through_service(audio_part(array)), load_audio(array))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x89PNG\r\n\x1a\nno more", "neither an image .* nor a recording"),
        (grey(np.random.default_rng(0).integers(0, 255, (99, 99), np.uint8), "PNG")[:5000], "broken"),
        (b"RIFFnonsense", "not a recording that can be read"),
        (b"a letter to nobody", "neither an image .* nor a recording"),
        (wav(np.zeros(0)), "empty"),
    ],
    ids=[
        "a header alone",
        "half a picture",
        "a WAV's first letters",
        "text",
        "a WAV without samples",
    ],  # a WAV holds the time
)
def test_a_file_that_is_neither_says_so_without_the_name_deciding(data, message, tmp_path):
    for name in ("a.png", "a.wav", "a"):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(MediaError, match=message):
            window._attached([str(tmp_path / name)])


@pytest.mark.parametrize(
    ("low", "high"), [(-3.0, 5.0), (0.0, 7.0), (0.0, 300.0), (0.0, 1e9), (0.0, float("nan"))]
)
def test_grey_of_an_unknown_range_is_refused(low, high):
    pixels = np.full((8, 8), low, np.float32)
    pixels[0] = high
    with pytest.raises(MediaError, match=r"grey values from .* range is unknown: give 0 to 1 or 0 to 255"):
        load_image(grey(pixels))


def test_a_broken_upload_empties_the_panel_and_is_named_when_asked_about(parts, tmp_path, monkeypatch):
    (tmp_path / "x.png").write_bytes(b"no picture")
    upload = parts["screen"].preprocess(ImageData(path=str(tmp_path / "x.png"), orig_name="x.png"))
    assert isinstance(upload, MediaError)
    told = []
    monkeypatch.setattr(window.gr, "Warning", told.append)
    talk = window.Window([chat.Endpoint("http://127.0.0.1:1/v1", "m")], "en")
    assert talk.take(upload) == (None, None)
    assert told == ["the image x.png is not an image that can be read (10 bytes; PNG, JPEG, WebP, ... can)"]
    asking = talk.answer({"text": "open it"}, upload, None, [], False, *["http://127.0.0.1:1/v1", "m", "x"] * 2,
                         False, False, 0, 16, "English")  # fmt: skip
    with pytest.raises(window.gr.Error, match=r"x\.png is not an image"):
        next(asking)
