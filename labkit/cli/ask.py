"""``labkit ask``: one request, its answer printed as it comes."""

import argparse
import sys
from dataclasses import dataclass
from typing import Any

from labkit.cli.arguments import MODEL, add_command
from labkit.common.errors import LabError
from labkit.common.formats import format_rate_per_s, format_seconds
from labkit.common.options import add_options, option, settings_of
from labkit.loading.options import LoadOptions


@dataclass(frozen=True, kw_only=True)
class AskOptions(LoadOptions):
    """What is asked beside the words, and how the answer is generated."""

    image: str | None = option(None, "a screenshot", metavar="FILE")
    audio: str | None = option(None, "a recording (wav, flac, ogg or mp3)", metavar="FILE")
    max_new_tokens: int = option(512, "longest answer", least=1)
    temperature: float = option(0.0, "0 takes the likeliest token", metavar="T")
    seed: int | None = option(None, "makes sampling repeatable", least=0)
    thinking: bool = option(False, "let the model think before it answers")


def add(commands: Any) -> None:
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
    """Everything given is read and checked before the model is loaded."""
    from labkit.common.messages import load_audio, load_image

    given = settings_of(options, AskOptions)
    content: list[dict[str, Any]] = []
    if given.image:
        content.append({"type": "image", "image": load_image(given.image)})
    if given.audio:
        content.append({"type": "audio", "audio": load_audio(given.audio)})
    if options.instruction and options.instruction.strip():
        content.append({"type": "text", "text": options.instruction})
    elif not given.audio:
        raise LabError("nothing is asked: give an instruction, or --audio with a spoken one")

    import torch

    from labkit.engine.sampling import SamplingSettings
    from labkit.loading.load import load
    from labkit.measure.job import check_senses

    settings = {
        "max_new_tokens": given.max_new_tokens,
        "temperature": given.temperature,
        "seed": given.seed,
    }
    SamplingSettings(**settings)  # refuses what is wrong before the model is read
    check_senses(options.model, [part["type"] for part in content if part["type"] != "text"])
    if given.threads:
        torch.set_num_threads(given.threads)
    engine = load(options.model, given.plan, given.device, progress=False)
    conversation = [{"role": "user", "content": content}]
    stream = engine.stream(conversation, enable_thinking=given.thinking, **settings)
    for delta in stream:
        print(delta, end="", flush=True)
    print(flush=True)
    done = stream.generation
    summary = f"{done.completion_tokens} tokens, first after {format_seconds(done.ttft_s)}"
    if done.decode_tokens_per_s:
        summary += f", then {format_rate_per_s(done.decode_tokens_per_s)}"
    print(
        summary + (", cut off: --max-new-tokens" if done.finish_reason == "length" else ""), file=sys.stderr
    )
