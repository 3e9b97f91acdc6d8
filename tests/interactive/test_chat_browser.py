"""The chat's window in a real browser: a picture, voices, two services, another language, the export."""

import json

import numpy as np
import pytest
import soundfile
from browsing import browser_needed, page
from fake_service import serving

from labkit import phonetap
from labkit.common.messages import normalise_messages
from labkit.interactive import chat
from labkit.phonetap.recordings import load_recording


@pytest.mark.slow
@browser_needed
def test_the_window_in_a_browser_with_a_picture_a_voice_and_two_services(tmp_path):
    item = phonetap.items("spoken", 1)[0]
    item.screen.image.save(tmp_path / "screen.png")
    soundfile.write(tmp_path / "voice.wav", load_recording(item.recording), 16_000)
    with serving(plan="int4") as one, serving(plan="fp32", answer="I *cannot* <b>see</b>") as two:
        blocks = chat.build([one.base_url, two.base_url])
        blocks.launch(prevent_thread_lock=True, quiet=True)
        try:
            with page() as tab:
                tab.set_default_timeout(120_000)
                tab.goto(blocks.local_url)
                tab.wait_for_selector("text=pocket in fp32, 21.2 MB")

                tab.locator("input[type=file]").first.set_input_files(str(tmp_path / "screen.png"))
                tab.wait_for_selector("img[alt='Uploaded image'], .image-frame img")
                tab.get_by_label("Think first").check()
                tab.locator("input[type=file]").last.set_input_files(str(tmp_path / "voice.wav"))
                tab.locator(".thumbnail-item:not(:has(.loader))").first.wait_for()
                tab.locator("textarea[data-testid=textbox]").last.press("Enter")
                for told in (
                    "21.2 MB of weights (fp32)",
                    "heard: “open it”",
                    'do(action="Tap", element=[500,500])',
                    "I *cannot* <b>see</b>",
                ):
                    tab.get_by_text(told).first.wait_for()
                taps = tab.locator("[data-testid=bot] img, .bot img")
                taps.first.wait_for()  # its component is loaded when it is first needed, after the words are there
                assert taps.count() == 1  # A's tap; B has none
                tab.get_by_label("Download").first.wait_for()
                assert not any(one.is_visible() for one in tab.get_by_label("Share").all())

                with tab.expect_download() as download:
                    tab.get_by_text("Export").click()
                assert json.loads(download.value.path().read_text())[0]["answers"][1]["plan"] == "fp32"
                tab.get_by_label("中文").check()
                tab.wait_for_selector("text=画一张新屏幕")
                tab.wait_for_selector("text=已连接: fake")
                tab.wait_for_selector("text=21.2 MB 权重 (fp32)")  # what was said before, too
                tab.get_by_text("画一张新屏幕").click()
                tab.wait_for_function(
                    "document.querySelector('textarea[data-testid=textbox]').value.length > 3"
                )
                tab.locator("textarea[data-testid=textbox]").last.press("Enter")
                tab.wait_for_function(
                    "document.body.innerText.split('21.2 MB 权重 (fp32)').length == 3 &&"
                    " [...document.images].every(one => one.complete && one.naturalWidth > 0)"
                )
        finally:
            blocks.close()
    assert tab.trouble == []
    assert [url for url in tab.asked if not url.startswith((blocks.local_url, "data:", "blob:"))] == []
    kinds = [part["type"] for part in one.asked[0]["messages"][0]["content"]]
    assert kinds == ["image_url", "input_audio"]
    assert one.asked[0]["messages"] == two.asked[0]["messages"]


@pytest.mark.slow
@browser_needed
def test_a_voice_is_recorded_by_the_microphone_and_sent(tmp_path):
    item = phonetap.items("spoken", 1)[0]
    soundfile.write(tmp_path / "voice.wav", load_recording(item.recording), 16_000)
    microphone = (
        "--use-fake-ui-for-media-stream",
        "--use-fake-device-for-media-stream",
        f"--use-file-for-fake-audio-capture={tmp_path / 'voice.wav'}",
    )
    with serving() as service:
        blocks = chat.build([service.base_url])
        blocks.launch(prevent_thread_lock=True, quiet=True)
        try:
            with page(flags=microphone, permissions=["microphone"]) as tab:
                tab.set_default_timeout(120_000)
                tab.goto(blocks.local_url)
                tab.wait_for_selector("text=connected: fake")
                tab.get_by_label("Record audio").click()
                tab.get_by_label("Start recording").click()
                tab.wait_for_timeout(2000)
                tab.get_by_label("Stop recording").click()
                tab.get_by_label("Attach audio").click()
                tab.locator(".thumbnail-item:not(:has(.loader))").first.wait_for()
                tab.locator("textarea[data-testid=textbox]").last.press("Enter")
                tab.get_by_text('do(action="Tap", element=[500,500])').first.wait_for()
        finally:
            blocks.close()
    assert tab.trouble == []
    [message] = normalise_messages(service.asked[0]["messages"])
    [audio] = message["content"]
    assert len(audio["audio"]) > 16_000
    assert np.abs(audio["audio"]).max() > 0.01  # a voice, not silence
