"""Trains the pocket phone agent. One command does it all, on one GPU or several, with sixteen cores a GPU:

    python -m labkit.models.pocket.training.train all --output runs/pocket [--natural natural.zip] [--gpus 2]

or step by step (what the shipped weights were made with; their card gives the options):

    TRAIN="python -m labkit.models.pocket.training.train"
    $TRAIN texts  --output runs/texts.jsonl                         what the voices say
    python -m labkit.models.pocket.training.voices.pool --texts runs/texts.jsonl --output runs/speech
    $TRAIN speech --pool runs/speech --texts runs/texts.jsonl --output runs/ear
    $TRAIN agent  --eye-seconds 150 --fall 0 --output runs/typed    reads, then taps
    $TRAIN agent  --init runs/typed --pool runs/speech --ear runs/ear --output runs/agent
    $TRAIN export --run runs/agent --output assets/pocket

`agent` goes on from `--init FOLDER` (an exported model or a run); without `--ear`, from a folder that `join` wrote, with the
model's own ear. Everything is logged as JSON lines in the output folder; a checkpoint is written every minute, when the
learning rate begins to fall (`plateau`), and at the end. `export` averages those two.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from labkit.common.files import atomic_path
from labkit.models.pocket.configuration import PocketConfig
from labkit.models.pocket.glm4v import save_processor
from labkit.models.pocket.processing import PocketProcessor
from labkit.models.pocket.training.agent import start_processes, train_agent
from labkit.models.pocket.training.batches import load_utterances
from labkit.models.pocket.training.losses import TrainingHeads
from labkit.models.pocket.training.runs import CONFIGS, Log, below, load_state, new_model
from labkit.models.pocket.training.speech import SpeechPool, join_texts, train_speech, write_texts
from labkit.models.pocket.training.tokenizer import tokenizer_of, train_tokenizer


def train_ear(options: argparse.Namespace) -> int:
    """The speech encoder's own training."""
    log = Log(options.output / "log.jsonl")
    device = torch.device(options.device)
    model, _ = new_model(options.size, train_tokenizer())
    index = join_texts(options.pool, options.texts, model.config)
    rows = list(load_utterances(index).rows)
    pool = SpeechPool(options.pool, rows, device)
    speech = model.model.speech.to(device)
    letters = TrainingHeads(model.config).letters.to(device)
    if options.init:
        load_init_ear(speech, letters, options.init)
    train_speech(speech, letters, pool, model.config, seconds=options.seconds, steps=options.steps,
                 batch=options.batch, learning_rate=options.rate, log=log)  # fmt: skip
    state = {f"speech.{k}": v.contiguous() for k, v in speech.state_dict().items()}
    state |= {f"letters.{k}": v.contiguous() for k, v in letters.state_dict().items()}
    with atomic_path(options.output / "speech.safetensors") as temporary:
        save_file(state, temporary)
    with atomic_path(options.output / "utterances.jsonl") as temporary:
        temporary.write_text(index.read_text(encoding="utf-8"), encoding="utf-8")
    return 0


def load_init_ear(speech: nn.Module, letters: nn.Module, folder: Path) -> None:
    """The ear of a whole model, to be trained on."""
    state, heads = load_state(folder)
    speech.load_state_dict(below(state, "model.speech."))
    if heads:
        letters.load_state_dict(below(heads, "letters."))


def export(options: argparse.Namespace) -> int:
    """Writes a run's model as a folder for `from_pretrained`: shards under 16 MB, tokenizer, processor.

    Its weights are the average of the run's last checkpoint and, at `--plateau-share`, the one from before the learning
    rate fell: the average generalizes better than either (Izmailov et al., 2018).
    """
    if not 0 <= options.plateau_share < 1:
        raise SystemExit(f"error: --plateau-share is {options.plateau_share}; it lies between 0 and 1")
    tokenizer = tokenizer_of(options.source)
    model, _ = new_model(options.size, tokenizer)
    state, _ = load_state(options.source)
    if options.plateau_share and (options.source / "plateau").is_dir():
        before, _ = load_state(options.source / "plateau")
        state = {
            name: torch.lerp(value, before[name], options.plateau_share) for name, value in state.items()
        }
    model.load_state_dict(state)
    is_pocket = isinstance(model.config, PocketConfig)
    model.to(torch.float16 if is_pocket else torch.bfloat16)  # Glm4v as the 9 B model is stored
    model.generation_config.do_sample = False
    model.save_pretrained(options.output, max_shard_size="15MB")
    if is_pocket:
        PocketProcessor(tokenizer, model.config).save_pretrained(options.output)
    else:
        save_processor(tokenizer, options.output)
    for file in options.output.glob("*.safetensors"):
        file.chmod(0o644)
    return 0


def join_speech_texts(options: argparse.Namespace) -> int:
    """Writes what each utterance of a pool asks for, for an agent that goes on with its own ear."""
    model, _ = new_model(options.size, train_tokenizer())
    index = join_texts(options.pool, options.texts, model.config)
    options.output.mkdir(parents=True, exist_ok=True)
    with atomic_path(options.output / "utterances.jsonl") as temporary:
        temporary.write_text(index.read_text(encoding="utf-8"), encoding="utf-8")
    return 0


def train_all(options: argparse.Namespace) -> int:
    """Texts, voices, ear, agent and export: the whole training, `--first-seconds` + `--seconds` and about two minutes.

    The voices speak and the ear learns (on the last GPU) while the agent learns to read and tap; then both go on together.
    """
    out = options.output
    out.mkdir(parents=True, exist_ok=True)
    texts, pool, ear = out / "texts.jsonl", out / "speech", out / "ear"
    write_texts(texts, options.count, options.seed)
    natural = ["--natural", options.natural] if options.natural else []
    common = ["--size", options.size, "--device", options.device]
    speech = ["speech", "--pool", pool, "--texts", texts, "--output", ear, *common]
    speech += ["--seconds", options.ear_seconds, "--batch", options.ear_batch]
    last_gpu = {"CUDA_VISIBLE_DEVICES": str(options.gpus - 1)} if options.device == "cuda" else {}
    steps = (
        (["labkit.models.pocket.training.voices.pool", "--texts", texts, "--output", pool, *natural], {}),
        (["labkit.models.pocket.training.train", *speech], last_gpu),
    )
    failed: list[Path] = []

    def hear() -> None:
        log = out / "speech.log"
        with log.open("w") as file:
            for arguments, where in steps:
                command = [sys.executable, "-m", *map(str, arguments)]
                environment = {**os.environ, **where}
                if subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment).returncode:
                    failed.append(log)
                    return

    listener = threading.Thread(target=hear, daemon=True)
    listener.start()
    if options.one_after_another:
        listener.join()
    more = options.agent.split()
    first = [
        "--output",
        out / "typed",
        "--seconds",
        options.first_seconds,
        "--eye-seconds",
        options.eye_seconds,
    ]
    code = main(["agent", "--seed", options.seed, *common, *first, "--fall", 0, *more])
    listener.join()
    if code or failed:
        print(*(f"error: speech failed: see {log}" for log in failed), sep="\n", file=sys.stderr)
        return code or 2
    second = ["--init", out / "typed", "--pool", pool, "--ear", ear, "--output", out / "agent"]
    second += ["--seconds", options.seconds, "--processes", options.gpus, "--warmup", 100, "--fall", 0.45]
    code = main(["agent", "--seed", options.seed + 1, *common, *second, *more])
    return code or main(["export", "--size", options.size, "--run", out / "agent", "--output", out / "model"])


def write_speech_texts(options: argparse.Namespace) -> int:
    """What the voices shall say."""
    write_texts(options.output, options.count, options.seed, options.part)
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    main = argparse.ArgumentParser(
        prog="python -m labkit.models.pocket.training.train", description=__doc__.split("\n")[0]
    )
    commands = main.add_subparsers(required=True)
    default_device = "cuda" if torch.cuda.is_available() else "cpu"

    def command(name: str, run) -> argparse.ArgumentParser:
        one = commands.add_parser(name, help=run.__doc__.split("\n")[0])
        one.set_defaults(run=run)
        one.add_argument("--output", type=Path, required=True)
        one.add_argument("--seed", type=int, default=1)
        one.add_argument("--size", choices=CONFIGS, default="standard")
        one.add_argument("--device", default=default_device)
        return one

    texts = command("texts", write_speech_texts)
    texts.add_argument("--count", type=int, default=40_000)
    texts.add_argument("--part", default="train", choices=("train", "calibration", "test"))
    join = command("join", join_speech_texts)
    join.add_argument("--pool", type=Path, required=True)
    join.add_argument("--texts", type=Path, required=True)
    ear = command("speech", train_ear)
    ear.add_argument("--pool", type=Path, required=True)
    ear.add_argument("--texts", type=Path, required=True)
    ear.add_argument("--init", type=Path, help="go on from this model's ear")
    ear.add_argument("--seconds", type=float, default=220)
    ear.add_argument("--steps", type=int)
    ear.add_argument("--batch", type=int, default=384)
    ear.add_argument("--rate", type=float, default=1e-3)
    agent = command("agent", train_agent)
    agent.add_argument("--pool", type=Path)
    agent.add_argument(
        "--ear", type=Path, help="folder that `speech` writes; awaited while typed training goes on"
    )
    agent.add_argument("--init", type=Path, help="go on from this model")
    agent.add_argument("--seconds", type=float, default=1200)
    agent.add_argument("--steps", type=int)
    agent.add_argument("--batch", type=int, default=256, help="samples; screens while the eye learns alone")
    agent.add_argument("--questions", type=int, default=4, help="samples about each screen")
    agent.add_argument("--spoken-share", type=float, default=0.5)
    agent.add_argument("--eye-seconds", type=float, default=0, help="teach the eye alone to read at first")
    agent.add_argument("--rate", type=float, default=8e-4)
    agent.add_argument("--warmup", type=int, default=300, help="steps")
    agent.add_argument(
        "--fall", type=float, default=0.35, help="last part of the training in which the rate falls; 0: never"
    )
    agent.add_argument("--processes", type=int, default=1, help="one a GPU")
    agent.add_argument("--workers", type=int, default=15, help="of each process")
    agent.add_argument("--slots", type=int, default=960, help="screens kept per worker and size")
    agent.add_argument(
        "--first-slots", type=int, default=64, help="screens per worker and size before batches begin"
    )
    agent.add_argument(
        "--rounds", type=int, default=4, help="how often a worker draws while it waits, at most"
    )
    agent.add_argument("--validation", type=int, default=128, help="items per size")
    agent.add_argument("--log-every", type=int, default=100)
    agent.add_argument("--check-every", type=int, default=500)
    agent.add_argument("--compile", action=argparse.BooleanOptionalAction, default=default_device == "cuda")
    whole = command("all", train_all)
    whole.add_argument("--gpus", type=int, default=max(1, torch.cuda.device_count()))
    whole.add_argument("--first-seconds", type=float, default=530, help="typed requests alone")
    whole.add_argument("--eye-seconds", type=float, default=150, help="of those: reading alone")
    whole.add_argument("--seconds", type=float, default=1050, help="typed and spoken requests")
    whole.add_argument("--ear-seconds", type=float, default=430)
    whole.add_argument("--ear-batch", type=int, default=448)
    whole.add_argument("--count", type=int, default=44_000, help="spoken instructions")
    whole.add_argument("--natural", type=Path, help="pool of natural speech (see natural_pool)")
    whole.add_argument(
        "--one-after-another", action="store_true", help="speech first, then the agent: for few cores"
    )
    whole.add_argument("--agent", default="", help="more options for both runs of `agent`, as one string")
    out = command("export", export)
    out.add_argument("--run", dest="source", type=Path, required=True)
    out.add_argument(
        "--plateau-share", type=float, default=0.4, help="of the checkpoint from before the rate fell"
    )
    return main


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point."""
    arguments = sys.argv[1:] if arguments is None else [*map(str, arguments)]
    options = parser().parse_args(arguments)
    if getattr(options, "processes", 1) > 1 and "RANK" not in os.environ:
        return start_processes(options.processes, arguments)
    return options.run(options)


if __name__ == "__main__":
    raise SystemExit(main())
