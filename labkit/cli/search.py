"""``labkit search``: the best plan within a budget of bytes."""

import argparse

from labkit.cli.arguments import UNQUANTIZED_MODEL, Commands, add_command, measured
from labkit.cli.terminal import console, make_table, print_files, write_chart
from labkit.common.formats import format_bytes, format_perplexity, format_rate
from labkit.common.options import add_options, settings_of
from labkit.loading.datasets import Datasets
from labkit.measure.options import GoalOptions, SearchOptions
from labkit.measure.search.goal import Goal


def add(commands: Commands) -> None:
    """Add the command to the command line."""
    command = add_command(
        commands,
        "search",
        run,
        "find the best plan for so many bytes",
        (
            "Choose a scheme for every Linear so that the model loses least within a budget, or the smallest\n"
            "plan that loses no more than is allowed: by prediction from sensitivities, then by measuring.\n"
            "The plan is judged beside uniform plans and reported on test items that the search never saw.\n"
            "Writes the plan file with its evidence, search.json and pareto.html to --output.\n\n"
            "Its rules speak of parts and relative depth: the same file fits models of other heights.\n\n"
            "Ctrl-C keeps what is measured; the same command again continues."
        ),
        (
            "examples:\n"
            "  labkit search pocket --memory 20MB\n"
            "  labkit search pocket --max-loss 0.5\n"
            "  labkit search ./my-llama --bits 5 --text book.txt"
        ),
    )
    command.add_argument("model", help=UNQUANTIZED_MODEL)
    add_options(command.add_mutually_exclusive_group(required=True), GoalOptions)
    add_options(command, SearchOptions)
    add_options(command, Datasets)


def run(options: argparse.Namespace) -> None:
    """Search for a plan, then print the measurements and the paths of the files."""
    from labkit.measure.search.search import search_plan

    goal = vars(settings_of(options, GoalOptions))
    label = Goal.of(**goal).label
    datasets = settings_of(options, Datasets)
    result, output = measured(
        options, search_plan, SearchOptions, f"search-{{model}}-{label}", datasets=datasets, **goal
    )
    write_chart(output / "pareto.html", result.plot())
    screen = console()
    rows = [
        [
            record["plan"],
            format_bytes(record["bytes"]),
            "–" if record.get("predicted_kl") is None else f"{record['predicted_kl']:.2e}",
            f"{record['kl']:.2e}",
            format_perplexity(record["perplexity"])
            if "perplexity" in record
            else format_rate(record.get("step_success_rate")),
        ]
        for record in result.rows()
    ]
    quality = "Perplexity" if "perplexity" in result.found else "Right steps"
    headers = ["Plan", "Weights", "KL, predicted", "KL, measured", quality]
    screen.print(make_table("On validation items", headers, rows))
    for sentence in result.conclusions():
        screen.print(f"• {sentence}", highlight=False)
    if result.test:
        from labkit.results import tables
        from labkit.results.comparison import Comparison

        measurements = Comparison.load(output / "test").measurements
        screen.print(make_table("On test items", *tables.quality_table(measurements)))
    print_files(screen, result.path, output / "search.json", output / "pareto.html")
