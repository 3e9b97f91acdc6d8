"""``labkit screen``: draw a phone screen of the benchmark."""

import argparse

from labkit.cli.arguments import Commands, add_command
from labkit.common.errors import LabError
from labkit.common.options import Kind


def add(commands: Commands) -> None:
    """Add the command to the command line."""
    command = add_command(
        commands,
        "screen",
        run,
        "draw a phone screen of the benchmark",
        "Draw a PhoneTap screen. The same seed always draws the same one.",
        config=False,
    )
    command.add_argument("--seed", type=Kind(int, least=0), required=True, metavar="N", help="which screen")
    command.add_argument("--output", required=True, metavar="FILE", help="a .png file")


def run(options: argparse.Namespace) -> None:
    """Draw a screen, and print a request that fits it."""
    from labkit import phonetap
    from labkit.common.files import atomic_path, user_path

    path = user_path(options.output)
    if path.suffix.lower() != ".png":
        raise LabError(f"--output must end in .png, not {path.suffix or path.name!r}")
    item = phonetap.items(split="typed", count=1, seed=options.seed, part="test")[0]
    with atomic_path(path) as temporary:
        item.screen.image.save(temporary)
    width, height = item.screen.size
    print(f"{path}: {width}×{height} pixels; try the instruction: {item.instruction}")
