"""``labkit fit``: which plans fit a device's memory."""

from __future__ import annotations

import argparse
import re
from dataclasses import fields

from labkit.cli.arguments import UNQUANTIZED_MODEL, Commands, add_command, result_folder
from labkit.common.errors import LabError
from labkit.common.options import add_options
from labkit.measure.options import FitOptions


def add(commands: Commands) -> None:
    """Add the command to the command line."""
    command = add_command(
        commands,
        "fit",
        run,
        "say which plans fit a device's memory",
        (
            "Predict what each plan needs, from the model's configuration alone: weights, the KV cache of one\n"
            "conversation, the activations of the longest prompt (a screenshot in it), and room to work in;\n"
            "and the decode speed that the memory's bandwidth allows at best. Nothing is loaded."
        ),
        (
            "examples:\n"
            "  labkit fit autoglm-phone-9b --memory 8GB\n"
            "  labkit fit autoglm-phone-9b --card rtx-4090 --context 25480\n"
            "  labkit fit pocket --memory 1GB --screen 224x476\n"
            "  labkit fit autoglm-phone-9b --check --plans bf16,int4 --device cuda\n\n"
            "--check loads each plan with random weights, answers one conversation, and says how far the\n"
            "prediction was off; fit.json in --output keeps it."
        ),
    )
    command.add_argument("model", help=UNQUANTIZED_MODEL)
    device = command.add_mutually_exclusive_group()
    add_options(device, FitOptions, ("memory", "card"))
    names = [item.name for item in fields(FitOptions) if item.name not in ("memory", "card")]
    add_options(command, FitOptions, names)


def run(options: argparse.Namespace) -> int | None:
    """Predict and print the table, or measure with ``--check``."""
    if options.check:
        return _check(options)
    if not options.memory and not options.card:
        raise LabError("give the device's memory (--memory 8GB) or a card (--card rtx-4090); or --check")
    from labkit.cli.terminal import console, make_table
    from labkit.common.formats import bytes_of, format_bytes
    from labkit.measure.fit import CONTEXT_BYTES, find_card, needs
    from labkit.plans.plan import presets

    card = find_card(options.card) if options.card else None
    free = bytes_of(options.memory) if card is None else card.memory_bytes - CONTEXT_BYTES
    if options.bandwidth is not None and not options.bandwidth > 0:
        raise LabError(f"--bandwidth is {options.bandwidth:g}; it is a number of GB a second above 0")
    bandwidth = options.bandwidth * 1e9 if options.bandwidth else card.bandwidth_bytes_per_s if card else None
    plans = options.plans or presets()
    estimates = needs(
        options.model, plans, context=options.context, screen=_pixels(options.screen),
        max_pixels=options.max_pixels,
    )  # fmt: skip
    headers = ["Plan", "Weights", "KV cache", "Activations", "Workspace", "Together", "Fits"]
    rows = [
        [
            need.plan,
            *map(format_bytes, (need.weights_bytes, need.cache_bytes, need.activation_bytes)),
            *map(format_bytes, (need.workspace_bytes, need.total_bytes)),
            "yes" if need.fits(free) else f"{format_bytes(need.total_bytes - free)} too much",
            *([f"{need.most_tokens_per_s(bandwidth):,.0f}"] if bandwidth else []),
        ]
        for need in estimates
    ]
    headers += ["Tokens/s at best"] if bandwidth else []
    screen = console()
    title = f"{options.model} in {format_bytes(free)}, {options.context:,} tokens"
    screen.print(make_table(title, headers, rows))
    if card is not None:
        line = f"{card.name}: {format_bytes(card.memory_bytes)}, of which CUDA takes about {format_bytes(CONTEXT_BYTES)}"
        screen.print(line, style="dim")


def _check(options: argparse.Namespace) -> int:
    """``labkit fit --check``: print what was measured. Returns 1 if a prediction is off, or a plan failed."""
    from labkit.cli.terminal import console, make_table
    from labkit.measure.fit_check import check_fit

    page, output = console(), result_folder(options, "fit-{model}")
    check = check_fit(
        options.model,
        options.plans,
        context=options.context,
        screen=_pixels(options.screen),
        max_pixels=options.max_pixels,
        device=options.device,
        output=output,
        say=lambda line: page.print(line, highlight=False),
    )
    page.print(make_table(f"{check.settings['model']}, {options.context:,} tokens", *check.rows()))
    page.print(str(output / check.FILE), highlight=False, soft_wrap=True)
    return int(not check.passed)


def _pixels(text: str) -> tuple[int, int] | None:
    """``1080x2400`` -> (1080, 2400); ``none`` -> None."""
    if text.strip().lower() == "none":
        return None
    match = re.fullmatch(r"\s*([1-9]\d{0,4})\s*[x×]\s*([1-9]\d{0,4})\s*", text)
    if match is None:
        raise LabError(f"--screen is {text!r}; write 1080x2400, or none")
    return int(match[1]), int(match[2])
