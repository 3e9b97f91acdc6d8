"""``labkit ask``: sends a request and prints the answer as it arrives."""

import argparse
import sys
from dataclasses import dataclass
from typing import Any

from labkit.cli.arguments import MODEL, Commands, add_command
from labkit.common.errors import LabError
from labkit.common.formats import format_rate_per_s, format_seconds
from labkit.common.options import add_options, option, settings_of
from labkit.loading.options import LoadOptions


@dataclass(frozen=True, kw_only=True)
class AskOptions(LoadOptions):
    """The image and the recording of a request, and the generation of its answer."""

    image: str | None = option(None, "a screenshot", metavar="FILE")
    audio: str | None = option(None, "a recording (wav, flac, ogg or mp3)", metavar="FILE")
    max_new_tokens: int = option(512, "longest answer", least=1)
    temperature: float = option(0.0, "0 takes the likeliest token", metavar="T")
    seed: int | None = option(None, "makes sampling repeatable", least=0)
    thinking: bool = option(False, "let the model think before it answers")


def add(commands: Commands) -> None:
    """Add the command to the command line."""
    command = add_command(
        commands,
        "ask",
        run,
        "ask a model one thing, with an image, a recording, or both",
        "Ask a model one thing and print its answer as it comes.",
        (
            "examples:\n"
            "  labkit screen --seed 1 --output screen.png\n"
            '  labkit ask pocket --image screen.png "open App Store" --thinking\n'
            "  labkit ask pocket --image screen.png --audio command.wav --plan int4"
        ),
    )
    command.add_argument("model", help=MODEL)
    command.add_argument("instruction", nargs="?", help="what is asked, in writing")
    add_options(command, AskOptions)


def run(options: argparse.Namespace) -> None:
    """Read and check all inputs, load the model, then print its answer."""
    from labkit.common.images import load_image
    from labkit.common.recordings import load_audio

    settings = settings_of(options, AskOptions)
    content: list[dict[str, Any]] = []
    if settings.image:
        content.append({"type": "image", "image": load_image(settings.image)})
    if settings.audio:
        content.append({"type": "audio", "audio": load_audio(settings.audio)})
    if options.instruction and options.instruction.strip():
        content.append({"type": "text", "text": options.instruction})
    elif not settings.audio:
        raise LabError("nothing is asked: give an instruction, or --audio with a spoken one")

    import torch

    from labkit.engine.sampling import SamplingSettings
    from labkit.loading.load import load
    from labkit.measure.job import check_senses

    sampling = {
        "max_new_tokens": settings.max_new_tokens,
        "temperature": settings.temperature,
        "seed": settings.seed,
    }
    SamplingSettings(**sampling)  # refuses wrong values before the model is loaded
    check_senses(options.model, [part["type"] for part in content if part["type"] != "text"])
    if settings.threads:
        torch.set_num_threads(settings.threads)
    engine = load(options.model, settings.plan, settings.device, progress=False)
    conversation = [{"role": "user", "content": content}]
    stream = engine.stream(conversation, enable_thinking=settings.thinking, **sampling)
    for delta in stream:
        print(delta, end="", flush=True)
    print(flush=True)
    generation = stream.generation
    summary = f"{generation.completion_tokens} tokens, first after {format_seconds(generation.ttft_s)}"
    if generation.decode_tokens_per_s:
        summary += f", then {format_rate_per_s(generation.decode_tokens_per_s)}"
    print(
        summary + (", cut off: --max-new-tokens" if generation.finish_reason == "length" else ""),
        file=sys.stderr,
    )
