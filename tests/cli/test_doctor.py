"""The diagnosis: what it says of this machine, and of machines with something wrong."""

import pytest
import torch

from labkit.cli.doctor import render
from labkit.measure import diagnosis
from labkit.measure.diagnosis import NOTE, OK, PROBLEM, Finding, diagnose


def texts(findings, status=None):
    return "\n".join(finding.text for finding in findings if status in (None, finding.status))


@pytest.fixture(scope="module")
def findings():
    return diagnose()


def test_every_topic_is_examined(findings):
    topics = list(dict.fromkeys(finding.topic for finding in findings))
    assert topics == [
        "Python", "Packages", "Machine", "GPU", "Schemes", "Models", "Benchmark", "Notebooks", "Network",
        "Training only",
    ]  # fmt: skip
    assert "could not be examined" not in texts(findings)


def test_schemes_and_kernels_of_the_cpu_are_named(findings):
    assert "on cpu: fp32, fp16, bf16, int8, int8-dynamic, int4" in texts(findings, OK)
    assert "int4 on cpu:" in texts(findings)


def test_the_9b_models_need_what_the_plans_predict(findings):
    line = next(
        finding.text for finding in findings if "9 B models" in finding.text and finding.topic == "Models"
    )
    assert "GB" in line


@pytest.mark.parametrize(
    ("gigabytes", "expected", "status"),
    [
        (16, r"fit cpu \(16\.0 GB\) under: .*int8 \(1[01]\.\d GB\).*int4 \(6\.\d GB\)", OK),
        (4, r"do not fit cpu \(4\.0 GB\): \S+ needs \d\.\d GB and \d\.\d GB to work", NOTE),
    ],
)
def test_memory_decides_what_fits(monkeypatch, gigabytes, expected, status):
    monkeypatch.setattr("labkit.common.machine.memory", lambda: (gigabytes * 10**9, 10**9))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    [finding] = diagnosis._does_9b_fit()
    assert finding.status == status
    import re

    assert re.search(expected, finding.text)
    assert "fp32 (" not in finding.text


def test_a_containers_limit_is_what_counts(monkeypatch, tmp_path):
    from labkit.common import machine

    limit, used = tmp_path / "memory.max", tmp_path / "memory.current"
    limit.write_text(str(10**9))
    used.write_text(str(4 * 10**8))
    monkeypatch.setattr(machine, "CGROUP_FILES", ((limit, used),))
    assert machine.memory() == (10**9, 6 * 10**8)
    limit.write_text("max\n")
    assert machine.memory()[0] > 10**9


def test_missing_and_other_versions_are_told_apart(monkeypatch):
    monkeypatch.setattr(
        "labkit.common.machine.requirements", lambda: iter([("torch", "==0.1"), ("no-such-package", "==1.0")])
    )
    other, missing = diagnosis._packages()
    assert (other.status, missing.status) == (NOTE, PROBLEM)
    assert "the lab is tested with 0.1" in other.text
    assert missing.advice == "pip install 'no-such-package==1.0'"


def test_a_driver_without_a_usable_torch_is_a_problem(monkeypatch):
    monkeypatch.setattr("labkit.common.machine.gpus", list)
    monkeypatch.setattr("labkit.common.machine.driver_versions", lambda: ["550.1"])
    [finding] = diagnosis._gpu()
    assert finding.status == PROBLEM
    assert "driver 550.1 is there, but torch cannot use it" in finding.text


def test_a_proxy_that_would_catch_localhost_is_a_problem(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    assert [finding.status for finding in diagnosis._network()] == [OK]
    monkeypatch.setenv("HTTP_PROXY", "http://proxy:3128")
    assert [finding.status for finding in diagnosis._network()] == [PROBLEM]
    monkeypatch.setenv("NO_PROXY", "localhost,127.0.0.1")
    assert [finding.status for finding in diagnosis._network()] == [OK]


def test_no_exception_escapes(monkeypatch):
    def fail():
        raise OSError("the disk is gone")

    monkeypatch.setattr(diagnosis, "_machine", fail)
    monkeypatch.setattr(diagnosis, "_does_9b_fit", lambda: iter(()))
    [line] = [finding for finding in diagnose() if finding.topic == "Machine"]
    assert line.text == "could not be examined: OSError: the disk is gone"


def test_the_text_groups_by_topic_and_counts_problems():
    told = render(
        [Finding("A", OK, "one"), Finding("A", PROBLEM, "two", "do this"), Finding("B", NOTE, "three")]
    )
    assert told == "A\n  ✓ one\n  ✗ two\n      do this\n\nB\n  · three\n\n1 problem found."
    assert render([Finding("A", OK, "one")]).endswith("Nothing is missing.")
