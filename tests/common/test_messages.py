"""Images and recordings: every accepted form gives the same, every unusable one a clear error."""

import base64
import io

import numpy as np
import pytest
import soundfile
from PIL import Image

from labkit.common.errors import LabError, MediaError
from labkit.common.messages import load_audio, load_image, normalise_messages


@pytest.fixture
def picture():
    return Image.fromarray(np.arange(20 * 30 * 3, dtype=np.uint8).reshape(20, 30, 3))


def encoded(image, kind="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def tone(seconds=0.5, rate=16_000, hertz=440.0):
    return np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate).astype(np.float32) * 0.5


def test_every_form_of_an_image_gives_the_same_pixels(picture, tmp_path):
    data = encoded(picture)
    (tmp_path / "a.png").write_bytes(data)
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    for source in (picture, data, tmp_path / "a.png", str(tmp_path / "a.png"), url):
        assert np.array_equal(np.asarray(load_image(source)), np.asarray(picture))


def test_transparency_becomes_white_and_rotation_is_applied(tmp_path):
    assert load_image(Image.new("RGBA", (4, 4), (255, 0, 0, 0))).getpixel((0, 0)) == (255, 255, 255)
    turned = Image.new("RGB", (40, 20))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "t.jpg", exif=exif)
    assert load_image(tmp_path / "t.jpg").size == (20, 40)


def test_sixteen_bit_grey_keeps_its_range():
    grey = Image.fromarray(np.full((4, 4), 65535, dtype=np.uint16))
    assert load_image(grey).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (b"", r"empty \(0 bytes\)"),
        (b"no image at all", r"is not an image"),
        ("/nowhere/a.png", r"/nowhere/a\.png does not exist"),
        ("https://example.org/a.png", r"web address.*not fetched"),
        ("data:image/png;base64", r"has no comma"),
        ("data:image/png;base64,@@@", r"not valid base64"),
        (17, r"not int"),
        (Image.new("RGB", (3000, 2)), r"strip of 3000 x 2"),
        (Image.new("L", (9000, 9000)), r"at most 50,000,000"),
    ],
)
def test_an_unusable_image_says_why(source, message):
    with pytest.raises(MediaError, match=message):
        load_image(source)


def test_a_cut_off_image_is_refused(picture, tmp_path):
    big = Image.fromarray(np.random.default_rng(0).integers(0, 255, (200, 200, 3), dtype=np.uint8))
    data = encoded(big)[:20_000]
    with pytest.raises(MediaError, match="broken"):
        load_image(data)
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(MediaError, match="cannot be read"):
        load_image(tmp_path / "folder.png")


@pytest.mark.parametrize(
    ("kind", "subtype"), [("WAV", "PCM_16"), ("FLAC", None), ("OGG", "VORBIS"), ("MP3", None)]
)
def test_every_file_type_gives_the_same_tone(tmp_path, kind, subtype):
    path = tmp_path / f"tone.{kind.lower()}"
    soundfile.write(path, tone(), 16_000, format=kind, subtype=subtype)
    samples = load_audio(path)
    assert samples.dtype == np.float32
    assert abs(len(samples) - 8000) < 1700  # mp3 pads
    spectrum = np.abs(np.fft.rfft(samples[:8000]))
    assert spectrum.argmax() * 16_000 / min(len(samples), 8000) == pytest.approx(440, abs=4)


def test_stereo_is_mixed_and_other_rates_are_resampled(tmp_path):
    left = tone(1.0, 44_100)
    soundfile.write(tmp_path / "s.wav", np.stack([left, np.zeros_like(left)], axis=1), 44_100)
    samples = load_audio(tmp_path / "s.wav")
    assert len(samples) == 16_000
    assert np.abs(samples[1000:15_000]).max() == pytest.approx(0.25, abs=0.01)


def test_integer_arrays_are_scaled_and_columns_mixed():
    whole = (tone() * 32767).astype(np.int16)
    assert np.allclose(load_audio(whole), tone(), atol=1e-3)
    assert np.allclose(load_audio(np.stack([tone(), tone()], axis=1)), tone(), atol=1e-6)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (np.zeros(0, np.float32), "empty"),
        (np.zeros(16_000, np.float32), "silent"),
        (np.ones(100, np.float32), r"lasts 0\.006 s; at least 0\.1 s"),
        (np.ones(16_000 * 31, np.float32), r"lasts 31\.0 s; at most 30 s"),
        (np.full(16_000, np.nan, np.float32), "not numbers"),
        (np.ones((2, 16_000), np.float32), r"shape \[2, 16000\]"),
        (np.ones(16_000, np.complex64), "type complex64"),
        (b"RIFFnonsense", "not a recording that can be read"),
        ("/nowhere/a.wav", "does not exist"),
        (None, "NoneType"),
    ],
)
def test_an_unusable_recording_says_why(source, message):
    with pytest.raises(MediaError, match=message):
        load_audio(source)


def test_a_long_file_is_refused_without_reading_it_all(tmp_path):
    soundfile.write(tmp_path / "long.flac", np.tile(tone(1.0), 60), 16_000)
    with pytest.raises(MediaError, match=r"lasts 60\.0 s"):
        load_audio(tmp_path / "long.flac")


def test_openai_parts_become_plain_parts(picture):
    image = "data:image/png;base64," + base64.b64encode(encoded(picture)).decode()
    buffer = io.BytesIO()
    soundfile.write(buffer, tone(), 16_000, format="WAV")
    sound = base64.b64encode(buffer.getvalue()).decode()
    parts = [
        {"type": "image_url", "image_url": {"url": image}},
        {"type": "input_audio", "input_audio": {"data": sound, "format": "wav"}},
        {"type": "text", "text": "tap it"},
    ]  # fmt: skip
    [message] = normalise_messages([{"role": "user", "content": parts}])
    assert [part["type"] for part in message["content"]] == ["image", "audio", "text"]
    assert message["content"][0]["image"].size == picture.size
    assert len(message["content"][1]["audio"]) == 8000


def test_a_service_request_cannot_name_a_local_file(picture, tmp_path):
    picture.save(tmp_path / "private.png")
    part = {"type": "image_url", "image_url": {"url": str(tmp_path / "private.png")}}
    with pytest.raises(MediaError, match="data: URL"):
        normalise_messages([{"role": "user", "content": [part]}])


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        ([], "empty"),
        ("hello", "is a list"),
        ([{"role": "user"}], "needs 'role' and 'content'"),
        ([{"role": "robot", "content": "x"}], "role 'robot'; known roles"),
        ([{"role": "user", "content": 3}], "string or a list"),
        ([{"role": "user", "content": []}], "empty list"),
        ([{"role": "user", "content": [{"type": "video", "video": 1}]}], "type 'video'; known types"),
        ([{"role": "user", "content": [{"type": "image"}]}], "type 'image' lacks 'image'"),
        ([{"role": "user", "content": ["text"]}], "type None"),
    ],
)
def test_a_message_of_the_wrong_form_says_what_is_right(messages, error):
    with pytest.raises(LabError, match=error) as caught:
        normalise_messages(messages)
    assert isinstance(caught.value, LabError)
