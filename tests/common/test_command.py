"""How a command ends: one line and an exit code for a wrong request, a full disk, a closed pipe; a traceback for a bug."""

import errno
import io
import os
import subprocess
import sys
import warnings

import pytest

from labkit.common.command import exit_code
from labkit.common.errors import Interrupted, LabError, WorkerFailedError
from labkit.common.files import atomic_path, user_path

FULL = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")


def ended(capsys, error):
    def run(words):
        raise error

    code = exit_code(run, [])
    out, err = capsys.readouterr()
    assert out == ""
    return code, err


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (LabError("no\nsuch  plan"), 2, "labkit: no such plan\n"),
        (WorkerFailedError("it died"), 1, "labkit: it died\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "r/report.html"),
            1,
            "r/report.html: No space left",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "/root/x"),
            2,
            "labkit: /root/x: Permission denied\n",
        ),
        (OSError(errno.ENAMETOOLONG, "File name too long", "a" * 3000), 2, "…: File name too long\n"),
        (MemoryError(), 1, "labkit: the memory is full\n"),
        (BrokenPipeError(), 0, ""),
        (KeyboardInterrupt(), 130, "\nlabkit: interrupted\n"),
        (Interrupted("2 of 3 plans are finished"), 130, "\nlabkit: 2 of 3 plans are finished\n"),
    ],
)
def test_each_end_has_its_line_and_its_code(capsys, error, code, line):
    actual, err = ended(capsys, error)
    assert actual == code
    assert line in err
    assert err.strip().count("\n") == 0


def test_a_bug_keeps_its_traceback(capsys):
    with pytest.raises(ZeroDivisionError):
        ended(capsys, ZeroDivisionError())


def test_undecodable_arguments_are_refused(capsys):
    words = [b"\xb4\xf2\xbf\xaa".decode(errors="surrogateescape")]
    assert exit_code(lambda words: 0, words) == 2
    assert "'\\udcb4\\udcf2\\udcbf\\udcaa' is no utf-8 text" in capsys.readouterr().err


def test_a_warning_is_one_line_without_a_path(capsys):
    def run(words):
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = warnings._showwarning_orig  # pytest's recording ends here
            sys.stderr.write(warnings.formatwarning("rule 1:\n q_proj falls back", UserWarning, __file__, 1))
        return 0

    before = warnings.formatwarning
    assert exit_code(run, []) == 0
    assert capsys.readouterr().err == "labkit: warning: rule 1: q_proj falls back\n"
    assert warnings.formatwarning is before


def test_a_character_that_the_terminal_lacks_is_escaped(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    assert exit_code(lambda words: print("✓ fine") or 0, []) == 0
    assert raw.getvalue() == b"\\u2713 fine\n"


def command(shell):
    line = f'"{sys.executable}" -m labkit {shell}'
    return subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)


@FULL
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("words", ["--help", "plans"])
def test_a_full_standard_output_is_said(monkeypatch, words, unbuffered):
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    done = command(f"{words} >/dev/full")
    assert (done.returncode, done.stderr) == (1, "labkit: standard output: No space left on device\n")


def test_a_closed_standard_output_is_refused_before_any_work():
    done = command("models >&-")
    assert done.returncode == 2
    assert done.stderr == "labkit: standard output is closed: send it to a file, or to /dev/null\n"


def test_a_reader_that_leaves_and_a_closed_standard_error_end_nothing_badly():
    done = command('plans | head -1; exit "${PIPESTATUS[0]}"')
    assert (done.returncode, done.stderr) == (0, "")
    done = command("plans 2>&- >/dev/null")
    assert done.returncode == 0


def test_a_failed_write_names_the_file_not_its_temporary_name(tmp_path):
    with pytest.raises(OSError, match="No space") as caught, atomic_path(tmp_path / "report.html"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.filename == str(tmp_path / "report.html")
    with pytest.raises(FileNotFoundError) as caught, atomic_path(tmp_path / "none.json"):
        pass
    assert caught.value.filename == str(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("~nosuchuser/plan.yaml", "no home of ~nosuchuser"),
        ("a" * 300, "File name too long"),
        ("plan\0.yaml", "NUL"),
    ],
)
def test_a_path_that_cannot_be_is_refused(path, reason):
    with pytest.raises(LabError, match=reason) as caught:
        user_path(path)
    assert len(str(caught.value)) < 160


def test_a_path_of_which_nothing_is_there_is_fine(tmp_path):
    assert user_path(tmp_path / "no" / "such") == tmp_path / "no" / "such"
    assert user_path("~") == user_path(os.path.expanduser("~"))
