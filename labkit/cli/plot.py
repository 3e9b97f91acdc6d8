"""``labkit plot``: a chart of a finished comparison."""

import argparse

from labkit.cli.arguments import Commands, add_command
from labkit.common.errors import LabError


def add(commands: Commands) -> None:
    """Add the command to the command line."""
    command = add_command(
        commands,
        "plot",
        run,
        "draw a finished comparison as one picture",
        "Draw bytes, time of an answer and right steps of a comparison as one SVG picture.",
        config=False,
    )
    command.add_argument("results", metavar="RESULTS", help="results.json, or the folder it is in")
    command.add_argument("--output", required=True, metavar="FILE", help="an .svg file")


def run(options: argparse.Namespace) -> None:
    """Draw the chart, with the settings of the comparison below it."""
    from labkit.common.files import atomic_path, user_path
    from labkit.results.charts.svg import comparison_svg
    from labkit.results.comparison import Comparison, describe

    path = user_path(options.output)
    if path.suffix.lower() != ".svg":
        raise LabError(f"--output must end in .svg, not {path.suffix or path.name!r}")
    comparison = Comparison.load(options.results)
    settings = comparison.settings
    picture = comparison_svg(comparison.measurements, describe(settings) if settings else "")
    with atomic_path(path) as temporary:
        temporary.write_text(picture, encoding="utf-8")
    print(path)
