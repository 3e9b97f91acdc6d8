"""What ``labkit sensitivity``, ``labkit search`` and ``labkit perplexity`` do."""

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any

from labkit.common.files import atomic_path
from labkit.common.formats import format_bytes, format_rate
from labkit.loading.datasets import Datasets
from labkit.terminal import console, make_table

SHOWN_LINEARS = 12
BROKEN = 9.0
"""From ten times the perplexity on nobody asks for per cent."""


def sensitivity(options: argparse.Namespace) -> None:
    """``labkit sensitivity``: measure, then print the most sensitive and where the files are."""
    from labkit.measure.search.sensitivity import measure_sensitivity

    found = measure_sensitivity(
        options.model,
        options.schemes,
        datasets=_datasets(options),
        parts=not options.no_parts,
        device=options.device,
        jobs=options.jobs,
        threads=options.threads,
        output=options.output,
    )
    output = Path(options.output or Path("results") / f"sensitivity-{Path(found.settings['model']).name}")
    _write_chart(output / "sensitivity.html", found.plot())
    screen = console()
    for scheme in found.settings["schemes"]:
        measured = [one for one in found.linears if one["scheme"] == scheme and "kl" in one]
        rows = [
            [one["linear"], one["role"] or "–", f"{one['kl']:.2e}", f"{one['sqnr_db']:.1f} dB"]
            for one in sorted(measured, key=lambda one: -one["kl"])[:SHOWN_LINEARS]
        ]
        headers = ["Linear", "Part", "KL, nats a token", "Output"]
        screen.print(make_table(f"Most sensitive to {scheme}, each alone", headers, rows, text_columns=(1,)))
    if found.parts:
        headers = ["Part", "Scheme", "Bytes", "KL, nats a token", "Click accuracy", "Right steps"]
        rows = [
            [
                one["part"],
                one["scheme"],
                format_bytes(one["bytes"]),
                f"{one['kl']:.2e}",
                format_rate(one.get("click_accuracy")),
                format_rate(one.get("step_success_rate")),
            ]
            for one in found.parts
        ]
        screen.print(make_table("Whole parts", headers, rows, text_columns=(1,)))
    _tell_files(screen, output / "sensitivity.json", output / "sensitivity.html")


def search(options: argparse.Namespace) -> None:
    """``labkit search``: find a plan, then print what was measured and where the files are."""
    from labkit.measure.search.search import search_plan

    found = search_plan(
        options.model,
        memory=options.memory,
        bits=options.bits,
        max_loss=options.max_loss,
        schemes=options.schemes,
        against=[one.strip() for one in options.against.split(",") if one.strip()],
        datasets=_datasets(options),
        test_items=options.test_items,
        name=options.name,
        device=options.device,
        jobs=options.jobs,
        threads=options.threads,
        sensitivities=options.sensitivities,
        parts=not options.no_parts,
        apart=options.apart,
        rounds=options.rounds,
        dtype=options.dtype,
        output=options.output,
    )
    output = Path(found.path).parent
    _write_chart(output / "pareto.html", found.plot())
    screen = console()
    rows = [
        [
            one["plan"],
            format_bytes(one["bytes"]),
            "–" if one.get("predicted_kl") is None else f"{one['predicted_kl']:.2e}",
            f"{one['kl']:.2e}",
            f"{one['perplexity']:.2f}" if "perplexity" in one else format_rate(one.get("step_success_rate")),
        ]
        for one in found.rows()
    ]
    judged = "Perplexity" if "perplexity" in found.found else "Right steps"
    headers = ["Plan", "Weights", "KL, predicted", "KL, measured", judged]
    screen.print(make_table("On validation items", headers, rows))
    for sentence in found.conclusions():
        screen.print(f"• {sentence}", highlight=False)
    if found.test:
        from labkit.results import tables
        from labkit.results.comparison import Comparison

        measurements = Comparison.load(output / "test").measurements
        screen.print(make_table("On test items", *tables.quality_table(measurements)))
    _tell_files(screen, found.path, output / "search.json", output / "pareto.html")


def perplexity(options: argparse.Namespace) -> None:
    """``labkit perplexity``: measure, then print the table and where the file is."""
    from labkit.measure.perplexity import FILE, compare_perplexity

    output = Path(options.output or Path("results") / f"perplexity-{Path(options.model).name}")
    found = compare_perplexity(
        options.model,
        options.plans,
        datasets=_datasets(options),
        dtype=options.dtype,
        device=options.device,
        threads=options.threads,
        output=output,
    )
    rows = [
        [
            one["plan"],
            format_bytes(one["bytes"]),
            f"{one['bits']:.2f}",
            f"{one['perplexity']:.2f}",
            _change(one["change"], one["low"], one["high"]),
            f"{one['kl']:.2e}",
        ]
        for one in found.rows()
    ]
    headers = ["Plan", "Weights", "Bits a value", "Perplexity", "vs unquantized [95 %]", "KL, nats a token"]
    screen = console()
    screen.print(make_table("", headers, rows))
    _tell_files(screen, output / FILE)


def _change(change: float, low: float, high: float) -> str:
    """``+3.0% [+2.1%, +4.0%]``; of a model that is broken how many times as large."""
    if change > BROKEN:
        return f"{1 + change:,.0f} times"
    return f"{change:+.1%} [{low:+.1%}, {high:+.1%}]".replace("-", "−")


def _datasets(options: argparse.Namespace) -> Any:

    return Datasets(**{item.name: getattr(options, item.name) for item in fields(Datasets)})


def _write_chart(path: Path, chart: Any) -> None:
    with atomic_path(path) as temporary:
        chart.write_html(temporary, include_plotlyjs=True)


def _tell_files(screen: Any, *paths: Any) -> None:
    screen.print("\n".join(map(str, paths)), highlight=False, soft_wrap=True)
