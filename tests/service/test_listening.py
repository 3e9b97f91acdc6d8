"""The service's socket: a busy port and a wrong address are found before anything takes long."""

import socket

import pytest

from labkit.common.errors import LabError
from labkit.service import log
from labkit.service.options import ServiceOptions
from labkit.service.serve import listening, url_of


def test_of_two_services_on_one_port_the_second_is_refused_before_it_loads():
    with listening(ServiceOptions(port=0)) as first:
        port = first.getsockname()[1]
        with pytest.raises(LabError, match=f"port {port} of 127.0.0.1 cannot be used"):
            listening(ServiceOptions(port=port)).__enter__()
    with listening(ServiceOptions(port=port)):  # and free again at once
        pass


def test_a_connection_waits_until_the_server_runs():
    with (
        listening(ServiceOptions(port=0)) as listener,
        socket.create_connection(listener.getsockname(), 2) as client,
    ):
        client.sendall(b"early")
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.recv(5) == b"early"


def test_ipv6_is_listened_on_and_shown_in_brackets():
    try:
        with listening(ServiceOptions(host="::1", port=0)) as listener:
            assert url_of(listener) == f"http://[::1]:{listener.getsockname()[1]}"
    except LabError as error:
        pytest.skip(f"no IPv6 here: {error}")


@pytest.mark.parametrize("host", ["a..b", "nowhere.invalid", "256.1.1.1", "é" * 80])
def test_an_address_of_nobody_is_refused_in_one_line(host):
    with pytest.raises(LabError, match=r"unknown|cannot be used"):
        listening(ServiceOptions(host=host, port=0)).__enter__()


def test_a_log_that_cannot_be_written_ends_nothing(monkeypatch):
    class Full:
        def write(self, text):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("sys.stdout", Full())
    log.info("still here")
