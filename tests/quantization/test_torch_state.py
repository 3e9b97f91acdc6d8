"""The guard of the lab's doors: torch's defaults inside, the caller's state afterwards."""

import threading

import pytest
import torch

from labkit.quantization.torch_state import default_torch_state, guarded, num_threads


@pytest.fixture(autouse=True)
def defaults():
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)


def state():
    return (
        torch.get_default_dtype(),
        torch.empty(0).device.type,
        torch.is_autocast_enabled("cpu"),
        torch.is_inference_mode_enabled(),
    )


DEFAULTS = (torch.float32, "cpu", False, False)


@pytest.mark.parametrize("fails", [False, True])
def test_whatever_the_caller_has_set_is_set_aside_and_comes_back(fails):
    seen = []

    @guarded
    def enter():
        seen.append(state())
        torch.set_default_dtype(torch.bfloat16)  # as a library that fails half-way
        if fails:
            raise KeyError("half-way")

    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        before = state()
        if fails:
            with pytest.raises(KeyError):
                enter()
        else:
            enter()
        assert state() == before == (torch.float64, "meta", True, True)
    assert seen == [DEFAULTS]


def test_a_failure_gives_the_default_dtype_back_when_it_was_torchs():
    @guarded
    def fails():
        torch.set_default_dtype(torch.float16)
        raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert torch.get_default_dtype() == torch.float32


def test_a_thread_that_leaves_first_does_not_take_the_dtype_from_another():
    torch.set_default_dtype(torch.float64)
    inside, leave, seen = threading.Event(), threading.Event(), []

    def work():
        with default_torch_state():
            inside.set()
            leave.wait(10)
            seen.append(torch.get_default_dtype())

    thread = threading.Thread(target=work)
    with default_torch_state():
        thread.start()
        assert inside.wait(10)
    leave.set()
    thread.join()
    assert seen == [torch.float32]
    assert torch.get_default_dtype() == torch.float64


def test_a_generator_is_guarded_at_each_step_and_not_between():
    @guarded
    def numbers():
        for _ in range(2):
            yield state()

    torch.set_default_dtype(torch.float64)
    for inside in numbers():
        assert inside == DEFAULTS
        assert torch.get_default_dtype() == torch.float64


def test_threads_are_the_callers_again():
    before = torch.get_num_threads()
    with num_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    with num_threads(None):
        assert torch.get_num_threads() == before
    assert torch.get_num_threads() == before
