"""``labkit fit``: its arguments, and what it prints."""

from __future__ import annotations

import argparse
import re

from labkit.arguments import count, later
from labkit.errors import LabError

CONTEXT = 4096


def add_fit(commands: argparse._SubParsersAction) -> None:
    """``labkit fit``."""
    command = commands.add_parser(
        "fit",
        help="say which plans fit a device's memory",
        description=(
            "Predict what each plan needs, from the model's configuration alone: weights, the KV cache of one\n"
            "conversation, the activations of the longest prompt (a screenshot in it), and room to work in;\n"
            "and the decode speed that the memory's bandwidth allows at best. Nothing is loaded."
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=(
            "examples:\n"
            "  labkit fit autoglm-phone-9b --memory 8GB\n"
            "  labkit fit autoglm-phone-9b --card rtx-4090 --context 25480\n"
            "  labkit fit pocket --memory 1GB --screen 224x476\n\n"
            "Measure what was predicted with `labkit compare`."
        ),
    )
    command.add_argument("model", help="a name from `labkit models`, a checkpoint's folder, or a hub id")
    where = command.add_mutually_exclusive_group(required=True)
    where.add_argument("--memory", metavar="8GB", help="free memory of the device")
    where.add_argument("--card", metavar="NAME", help="a graphics card, such as rtx-4090 or h100")
    command.add_argument("--bandwidth", type=float, metavar="GB/S", help="of the memory (the card's)")
    command.add_argument(
        "--context", type=count, default=CONTEXT, metavar="N", help=f"tokens of the conversation ({CONTEXT})"
    )
    command.add_argument(
        "--screen", default="1080x2400", metavar="WxH", help="the screenshot's pixels, or none (1080x2400)"
    )
    command.add_argument(
        "--max-pixels", type=count, metavar="N", help="limit of the image processor (the model's)"
    )
    command.add_argument("--plans", metavar="A,B,…", help="names or files (every preset)")
    command.set_defaults(run=later("fit", "labkit.fit_cli"))


def fit(options: argparse.Namespace) -> None:
    """What ``labkit fit`` does."""
    from labkit.cards import CONTEXT_BYTES, find_card
    from labkit.fitting import needs
    from labkit.formats import format_bytes
    from labkit.goal import bytes_of
    from labkit.plan import presets
    from labkit.terminal import console, make_table

    card = find_card(options.card) if options.card else None
    free = bytes_of(options.memory) if card is None else card.memory_bytes - CONTEXT_BYTES
    if options.bandwidth is not None and not options.bandwidth > 0:
        raise LabError(f"--bandwidth is {options.bandwidth:g}; it is a number of GB a second above 0")
    bandwidth = options.bandwidth * 1e9 if options.bandwidth else card.bandwidth_bytes_per_s if card else None
    plans = [name.strip() for name in options.plans.split(",")] if options.plans else presets()
    found = needs(
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
        for need in found
    ]
    headers += ["Tokens/s at best"] if bandwidth else []
    screen = console()
    title = f"{options.model} in {format_bytes(free)}, {options.context:,} tokens"
    screen.print(make_table(title, headers, rows))
    if card is not None:
        said = f"{card.name}: {format_bytes(card.memory_bytes)}, of which CUDA takes about {format_bytes(CONTEXT_BYTES)}"
        screen.print(said, style="dim")


def _pixels(text: str) -> tuple[int, int] | None:
    """``1080x2400`` -> (1080, 2400); ``none`` -> None."""
    if text.strip().lower() == "none":
        return None
    found = re.fullmatch(r"\s*([1-9]\d{0,4})\s*[x×]\s*([1-9]\d{0,4})\s*", text)
    if found is None:
        raise LabError(f"--screen is {text!r}; write 1080x2400, or none")
    return int(found[1]), int(found[2])
