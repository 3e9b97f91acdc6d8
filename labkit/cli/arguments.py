"""What the commands' arguments have in common: numbers that are checked, the machine."""

import argparse

MODEL = "a name from `labkit models`, a checkpoint's folder, a folder of `labkit quantize`, or a hub id"


def add_machine(command: argparse.ArgumentParser) -> None:
    """``--device`` and ``--threads``."""
    command.add_argument(
        "--device", default="auto", help="auto, cpu, cuda, cuda:N, or several GPUs, cuda:0,cuda:1 (auto)"
    )
    command.add_argument("--threads", type=count, metavar="N", help="CPU threads (all cores)")


def count(text: str) -> int:
    """A whole number of at least 1."""
    value = _whole_number(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {text}")
    return value


def count_or_none(text: str) -> int:
    """A whole number of at least 0."""
    value = _whole_number(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be 0 or more, not {text}")
    return value


def listed(text: str) -> list[str]:
    """The parts of a text with commas between them."""
    return [part.strip() for part in text.split(",") if part.strip()]


def _whole_number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, not {text!r}") from None
