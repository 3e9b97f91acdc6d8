"""The shipped recordings: complete, short enough to ship, and by speakers that training never hears."""

import hashlib
import zipfile
from collections import Counter

import numpy as np
import pytest

from labkit.common.errors import LabError
from labkit.phonetap.recordings import (
    GROUPS,
    SpeechPool,
    load_recording,
    recordings,
    recordings_folder,
    write_pool,
)

pytest.importorskip("soundfile")


def tone(hertz: float, seconds: float = 0.5) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(int(16_000 * seconds)) / 16_000)).astype(np.float32)


def loudest(samples: np.ndarray) -> float:
    """The strongest frequency in Hz."""
    return float(np.abs(np.fft.rfft(samples)).argmax() * 16_000 / len(samples))


def test_both_languages_and_both_groups_are_shipped_in_equal_numbers():
    counted = Counter((recording.lang, recording.group) for recording in recordings("test"))
    assert counted == {(lang, group): 75 for lang in ("zh", "en") for group in GROUPS}
    assert Counter(recording.lang for recording in recordings("calibration")) == {"zh": 30, "en": 30}


def test_the_recordings_stay_within_three_megabytes():
    assert sum(file.stat().st_size for file in recordings_folder().glob("*.zip")) < 3_000_000


def test_every_file_is_the_one_the_index_names():
    for part in ("test", "calibration"):
        pool = SpeechPool(recordings_folder() / f"{part}.zip")
        for recording in recordings(part):
            assert hashlib.sha256(pool.raw(recording.id)).hexdigest() == recording.sha256


def test_a_recording_is_speech_of_the_length_it_names():
    for recording in recordings("test")[::25]:
        samples = load_recording(recording.id)
        assert samples.dtype == np.float32
        assert samples.ndim == 1
        assert len(samples) / 16_000 == pytest.approx(recording.seconds, abs=0.01)
        assert 0.3 < np.abs(samples).max() <= 1.2


def test_each_recording_asks_for_a_label_or_says_the_whole_action():
    for recording in recordings("test") + recordings("calibration"):
        assert (recording.target is None) != (recording.action is None)
        if recording.task == "tap":
            assert recording.target in recording.text


def test_pico_and_the_natural_mandarin_speakers_are_never_calibrated_on():
    unseen = {recording.voice for recording in recordings("test", group="unseen_speaker")}
    assert unseen == {"pico/en-US", "pico/en-GB", "kokoro/jm_kumo", "kokoro/jf_tebukuro"}
    assert not unseen & {recording.voice for recording in recordings("calibration")}


def test_test_and_calibration_share_neither_texts_nor_voices():
    test, calibration = recordings("test"), recordings("calibration")
    assert not {recording.text for recording in test} & {recording.text for recording in calibration}
    assert not {recording.voice for recording in test} & {recording.voice for recording in calibration}


def test_language_and_group_select():
    chosen = recordings("test", lang="zh", group="unseen_speaker")
    assert len(chosen) == 75
    assert {(recording.lang, recording.engine) for recording in chosen} == {("zh", "kokoro")}


@pytest.mark.parametrize("per_file", [1, 2])
def test_a_pool_gives_back_what_was_put_in(tmp_path, per_file):
    pitches = {"a": 300.0, "b": 600.0, "c": 1200.0}
    entries = [({"id": name, "text": name}, tone(hertz)) for name, hertz in pitches.items()]
    assert write_pool(tmp_path / "pool.zip", entries, per_file=per_file) == 3
    pool = SpeechPool(tmp_path / "pool.zip")
    assert [entry["id"] for entry in pool.entries] == ["a", "b", "c"]
    for name, hertz in pitches.items():
        assert len(pool.load(name)) == 8_000
        assert loudest(pool.load(name)) == pytest.approx(hertz, abs=4)


def test_equal_recordings_make_equal_pools(tmp_path):
    for name in ("one", "two"):
        write_pool(tmp_path / f"{name}.zip", [({"id": "a"}, tone(440))])
    one, two = (zipfile.ZipFile(tmp_path / f"{name}.zip") for name in ("one", "two"))
    assert [info.date_time for info in one.infolist()] == [info.date_time for info in two.infolist()]
    assert one.namelist() == two.namelist() == ["a.ogg", "index.jsonl"]


def test_wrong_names_are_answered_with_what_would_be_right(tmp_path):
    with pytest.raises(LabError, match="known: test, calibration"):
        recordings("train")
    with pytest.raises(LabError, match="known: unseen_voice"):
        recordings("test", group="loud")
    with pytest.raises(LabError, match="test-zh-003"):
        load_recording("nothing")
    with pytest.raises(LabError, match="has no recording"):
        load_recording("test-fr-000")
    with pytest.raises(LabError, match="no pool"):
        SpeechPool(tmp_path / "none.zip")
    (tmp_path / "bad.zip").write_bytes(b"not a zip")
    with pytest.raises(LabError, match="not a pool"):
        SpeechPool(tmp_path / "bad.zip")
