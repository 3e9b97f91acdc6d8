"""What all tests share: no proxy before this machine, GPU tests only on a GPU, and slow ones first."""

import os
import signal

import pytest

for name in ("NO_PROXY", "no_proxy"):  # services that tests start are asked directly
    os.environ[name] = ",".join(filter(None, [os.environ.get(name), "localhost", "127.0.0.1"]))

# A run in the background ignores interrupts, and so would the processes that tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's kernels then run on the CPU
    marked = [(item, item.get_closest_marker("gpu")) for item in items]
    gpu = [item for item, mark in marked if mark and not (interpreted and mark.kwargs.get("interpreted"))]
    if gpu:
        import torch

        if not torch.cuda.is_available():
            for item in gpu:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
