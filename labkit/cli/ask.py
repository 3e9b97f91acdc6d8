"""``labkit ask`` and ``labkit screen``: one question, one screenshot."""

import argparse
import sys
from pathlib import Path
from typing import Any

from labkit.cli.arguments import MODEL, add_machine, count, count_or_none
from labkit.cli.compare import _add_thinking
from labkit.common.errors import LabError
from labkit.common.formats import format_rate_per_s, format_seconds


def add_ask(commands: argparse._SubParsersAction) -> None:
    """``labkit ask``."""
    command = commands.add_parser(
        "ask",
        help="ask a model one thing, with an image, a recording, or both",
        description="Ask a model one thing and print its answer as it comes.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=(
            "examples:\n"
            '  labkit ask pocket --image screen.png "open the settings" --thinking\n'
            "  labkit ask pocket --image screen.png --audio command.wav --plan int4"
        ),
    )
    command.add_argument("model", help=MODEL)
    command.add_argument("instruction", nargs="?", help="what is asked, in writing")
    command.add_argument("--image", metavar="FILE", help="a screenshot")
    command.add_argument("--audio", metavar="FILE", help="a recording (wav, flac, ogg or mp3)")
    command.add_argument(
        "--plan", help="a name from `labkit plans`, or a YAML file (bf16; a quantized folder has its own)"
    )
    command.add_argument(
        "--max-new-tokens", type=count, default=512, metavar="N", help="longest answer (512)"
    )
    command.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0 takes the likeliest token (0)"
    )
    command.add_argument("--seed", type=count_or_none, metavar="N", help="makes sampling repeatable")
    add_machine(command)
    _add_thinking(command)
    command.set_defaults(run=ask)


def add_screen(commands: argparse._SubParsersAction) -> None:
    """``labkit screen``."""
    command = commands.add_parser(
        "screen",
        help="draw a phone screen of the benchmark",
        description="Draw a PhoneTap screen. The same seed always draws the same one.",
    )
    command.add_argument("--seed", type=count_or_none, required=True, metavar="N", help="which screen")
    command.add_argument("--output", required=True, metavar="FILE", help="a .png file")
    command.set_defaults(run=screen)


def ask(options: argparse.Namespace) -> None:
    """``labkit ask``: everything given is read and checked before the model is loaded."""
    from labkit.common.messages import load_audio, load_image

    content: list[dict[str, Any]] = []
    if options.image:
        content.append({"type": "image", "image": load_image(options.image)})
    if options.audio:
        content.append({"type": "audio", "audio": load_audio(options.audio)})
    if options.instruction and options.instruction.strip():
        content.append({"type": "text", "text": options.instruction})
    elif not options.audio:
        raise LabError("nothing is asked: give an instruction, or --audio with a spoken one")

    import torch

    from labkit.engine.sampling import SamplingSettings
    from labkit.loading.load import load
    from labkit.measure.job import check_senses

    settings = {
        "max_new_tokens": options.max_new_tokens,
        "temperature": options.temperature,
        "seed": options.seed,
    }
    SamplingSettings(**settings)  # refuses what is wrong before the model is read
    check_senses(options.model, [part["type"] for part in content if part["type"] != "text"])
    if options.threads:
        torch.set_num_threads(options.threads)
    engine = load(options.model, options.plan, options.device, progress=False)
    conversation = [{"role": "user", "content": content}]
    stream = engine.stream(conversation, enable_thinking=options.thinking, **settings)
    for delta in stream:
        print(delta, end="", flush=True)
    print(flush=True)
    done = stream.generation
    told = f"{done.completion_tokens} tokens, first after {format_seconds(done.ttft_s)}"
    if done.decode_tokens_per_s:
        told += f", then {format_rate_per_s(done.decode_tokens_per_s)}"
    print(told + (", cut off: --max-new-tokens" if done.finish_reason == "length" else ""), file=sys.stderr)


def screen(options: argparse.Namespace) -> None:
    """``labkit screen``: draw one, and say what could be asked of it."""
    from labkit import phonetap
    from labkit.common.files import atomic_path

    path = Path(options.output)
    if path.suffix.lower() != ".png":
        raise LabError(f"--output must end in .png, not {path.suffix or path.name!r}")
    item = phonetap.items(split="typed", count=1, seed=options.seed, part="test")[0]
    try:
        with atomic_path(path) as temporary:
            item.screen.image.save(temporary)
    except OSError as error:
        raise LabError(f"{path} cannot be written: {error.strerror or error}") from None
    width, height = item.screen.size
    print(f"{path}: {width}×{height} pixels; try the instruction: {item.instruction}")
