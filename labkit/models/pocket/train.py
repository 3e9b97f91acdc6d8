"""Trains the pocket phone agent. One command does it all, on one GPU with sixteen cores:

    python -m labkit.models.pocket.train all --output runs/pocket --seconds 1500 [--init assets/pocket]

or step by step (they can run side by side: the agent starts with typed requests and takes up speech when it is ready):

    python -m labkit.models.pocket.train texts  --output runs/texts.jsonl              what the voices shall say
    python -m labkit.models.pocket.voices --texts runs/texts.jsonl --output runs/speech     they say it
    python -m labkit.models.pocket.train speech --pool runs/speech --texts runs/texts.jsonl --output runs/ear
    python -m labkit.models.pocket.train agent  --pool runs/speech --ear runs/ear --output runs/agent
    python -m labkit.models.pocket.train export --run runs/agent --output assets/pocket

`agent` and `all` go on from `--init FOLDER` (an exported model or a run), then the model's own ear goes on too. Everything
is logged as JSON lines in the output folder; a checkpoint is written every minute and at the end.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from labkit.files import atomic_path
from labkit.models.pocket.configuration import PocketConfig
from labkit.models.pocket.modeling import PocketForConditionalGeneration
from labkit.models.pocket.processing import PocketProcessor
from labkit.models.pocket.tokenizer import VOCAB_SIZE, train_tokenizer
from labkit.models.pocket.train_batches import SIZES, Batch, BatchMaker, BatchSource, load_utterances
from labkit.models.pocket.train_losses import TrainingHeads
from labkit.models.pocket.train_samples import Encoder
from labkit.models.pocket.train_speech import SpeechPool, join_texts, train_speech, write_texts
from labkit.models.pocket.trainer import Prefetch, Trainer, below


class Log:
    """JSON lines to a file and to the screen."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("a", encoding="utf-8")

    def __call__(self, record: dict) -> None:
        line = json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in record.items()})
        self.file.write(line + "\n")
        self.file.flush()
        print(line, flush=True)


def new_model(size: str, tokenizer) -> tuple[PocketForConditionalGeneration, Encoder]:
    """A pocket model with random weights (`size`: standard or tiny) for a tokenizer."""
    encoder = Encoder(tokenizer)
    make = {"standard": PocketConfig.standard, "tiny": PocketConfig.tiny}[size]
    torch.manual_seed(0)
    return PocketForConditionalGeneration(make(encoder.id, VOCAB_SIZE)), encoder


def load_state(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Weights of an exported model or a run, and of its training heads where they are there, in float32."""
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise FileNotFoundError(f"no model*.safetensors in {folder}")
    heads = [folder / "heads.safetensors"] if (folder / "heads.safetensors").exists() else []
    return tuple(
        {k: v.float() for file in some for k, v in load_file(file).items()} for some in (files, heads)
    )


def load_init(model: nn.Module, heads: nn.Module, folder: Path) -> None:
    """Weights to go on from; a head that was added since begins anew."""
    state, its_heads = load_state(folder)
    model.load_state_dict(state)
    heads.load_state_dict(its_heads, strict=False)


def validation(encoder: Encoder, count: int, seed: int = 987) -> list[Batch]:
    """Typed batches on screens, labels and phrases of the test style, with their pixels."""
    import numpy as np

    batches = []
    for size in range(len(SIZES)):
        maker = BatchMaker(encoder, seed + size, style="test", part="test", hard=0.3)
        drawn = [maker.draw(SIZES[size]) for _ in range(count)]
        batch = maker.batch("typed", size, [d for _, d in drawn], count)
        batch.arrays["pixels"] = np.stack([drawn[slot][0] for slot in batch.arrays["slots"]])
        batches.append(batch)
    return batches


def train_agent(options: argparse.Namespace) -> int:
    """The joint training; see the module's docstring."""
    log = Log(options.output / "log.jsonl")
    device = torch.device(options.device)
    tokenizer = train_tokenizer()
    model, encoder = new_model(options.size, tokenizer)
    checks = validation(encoder, options.validation)
    index = options.ear / "utterances.jsonl" if options.ear else None
    source = BatchSource(
        encoder,
        workers=options.workers,
        slots=options.slots,
        first_slots=options.first_slots,
        batch=options.batch,
        seed=options.seed,
        speech_index=index,
        spoken_share=options.spoken_share,
        eye_seconds=options.eye_seconds,
    )
    began = time.monotonic()
    try:
        torch.set_float32_matmul_precision("high")
        trainer = Trainer(model, encoder, device=device, rate=options.rate, compile_layers=options.compile)
        if options.init:
            load_init(model, trainer.heads, options.init)
        generator = torch.Generator(device=device).manual_seed(options.seed)
        trainer.pixels = [torch.zeros(p.shape, dtype=torch.uint8, device=device) for p in source.pixels]
        messages, step, waited, saved = iter(Prefetch(source, device)), 0, 0.0, time.monotonic()
        sums: dict[str, list[torch.Tensor]] = {}
        while True:
            elapsed = time.monotonic() - began
            progress = step / options.steps if options.steps else elapsed / options.seconds
            if progress >= 1:
                break
            asked = time.monotonic()
            message = next(messages)
            waited += time.monotonic() - asked
            if message[0] == "slots":
                _, size, first, fresh = message
                trainer.pixels[size][first : first + len(fresh)] = fresh
                continue
            message, data = message
            if message.kind == "spoken" and trainer.pool is None:
                rows = list(load_utterances(index).rows)
                trainer.take_ear(options.ear, SpeechPool(options.pool, rows, device))
                log({"step": step, "seconds": elapsed, "ear": len(rows)})
            factor = min(1.0, (step + 1) / options.warmup) * min(
                1.0, max(0.02, (1 - progress) / options.fall)
            )
            parts = trainer.step(message, data, factor, generator)
            for name, value in parts.items():
                sums.setdefault(f"{message.kind}.{name}", []).append(value)
            step += 1
            if step % options.log_every == 0:
                means = {
                    name: float(torch.stack([v.float() for v in values]).mean())
                    for name, values in sums.items()
                }
                log({"step": step, "seconds": elapsed, "waited": waited, "factor": factor, **means})
                sums = {}
            if step % options.check_every == 0:
                log({"step": step, "check": True, **trainer.evaluate(checks)})
            if time.monotonic() - saved > 60:
                trainer.save(options.output)
                saved = time.monotonic()
        log({"step": step, "check": True, "seconds": time.monotonic() - began, **trainer.evaluate(checks)})
        trainer.save(options.output)
    finally:
        source.close()
    return 0


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
    """Writes a run's model as a folder for `from_pretrained`: float16 shards under 16 MB, tokenizer, processor."""
    tokenizer = train_tokenizer()
    model, _ = new_model(options.size, tokenizer)
    model.load_state_dict({k: v.float() for k, v in load_file(options.source / "model.safetensors").items()})
    model.half()
    model.generation_config.do_sample = False
    model.save_pretrained(options.output, max_shard_size="15MB")
    PocketProcessor(tokenizer, model.config).save_pretrained(options.output)
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
    """Texts, voices, ear, agent and export: the whole training in `--seconds` (and about two minutes around them)."""
    out = options.output
    out.mkdir(parents=True, exist_ok=True)
    texts, pool, ear, run = out / "texts.jsonl", out / "speech", out / "ear", out / "agent"
    write_texts(texts, options.count, options.seed)
    python, module = sys.executable, "labkit.models.pocket"
    natural = ["--natural", str(options.natural)] if options.natural else []
    speak = [python, "-m", f"{module}.voices", "--texts", texts, "--output", pool, *natural]
    same = [
        "--pool",
        pool,
        "--texts",
        texts,
        "--output",
        ear,
        "--size",
        options.size,
        "--device",
        options.device,
    ]
    if options.init:  # the model brings an ear: only say what each utterance asks for
        listen = [python, "-m", f"{module}.train", "join", *same]
    else:
        listen = [python, "-m", f"{module}.train", "speech", *same, "--seconds", str(options.ear_seconds)]

    def hear() -> None:
        with (out / "speech.log").open("w") as file:
            for step in (speak, listen):
                if subprocess.run(
                    [str(part) for part in step], stdout=file, stderr=subprocess.STDOUT
                ).returncode:
                    print(
                        f"speech failed, the agent goes on without it: see {out / 'speech.log'}", flush=True
                    )
                    return

    listener = threading.Thread(target=hear, daemon=True)
    listener.start()
    if options.one_after_another:
        listener.join()
    arguments = ["agent", "--pool", pool, "--ear", ear, "--output", run, "--seconds", options.seconds]
    arguments += ["--seed", options.seed, "--size", options.size, "--device", options.device]
    arguments += ["--init", options.init] if options.init else []
    arguments += options.agent.split()
    main([str(part) for part in arguments])
    listener.join()
    return main(["export", "--size", options.size, "--run", str(run), "--output", str(out / "model")])


def write_speech_texts(options: argparse.Namespace) -> int:
    """What the voices shall say."""
    write_texts(options.output, options.count, options.seed, options.part)
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    main = argparse.ArgumentParser(
        prog="python -m labkit.models.pocket.train", description=__doc__.split("\n")[0]
    )
    commands = main.add_subparsers(required=True)
    default_device = "cuda" if torch.cuda.is_available() else "cpu"

    def command(name: str, run) -> argparse.ArgumentParser:
        one = commands.add_parser(name, help=run.__doc__.split("\n")[0])
        one.set_defaults(run=run)
        one.add_argument("--output", type=Path, required=True)
        one.add_argument("--seed", type=int, default=1)
        one.add_argument("--size", choices=("standard", "tiny"), default="standard")
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
    agent.add_argument("--batch", type=int, default=224)
    agent.add_argument("--spoken-share", type=float, default=0.5)
    agent.add_argument("--eye-seconds", type=float, default=0, help="teach the eye alone to read at first")
    agent.add_argument("--rate", type=float, default=8e-4)
    agent.add_argument("--warmup", type=int, default=300, help="steps")
    agent.add_argument(
        "--fall", type=float, default=0.35, help="last part of the training in which the rate falls"
    )
    agent.add_argument("--workers", type=int, default=15)
    agent.add_argument("--slots", type=int, default=960, help="screens kept per worker and size")
    agent.add_argument(
        "--first-slots", type=int, default=64, help="screens per worker and size before batches begin"
    )
    agent.add_argument("--validation", type=int, default=128, help="items per size")
    agent.add_argument("--log-every", type=int, default=100)
    agent.add_argument("--check-every", type=int, default=500)
    agent.add_argument("--compile", action=argparse.BooleanOptionalAction, default=default_device == "cuda")
    whole = command("all", train_all)
    whole.add_argument("--seconds", type=float, default=1500, help="for the agent, speech included")
    whole.add_argument("--ear-seconds", type=float, default=270)
    whole.add_argument("--count", type=int, default=44_000, help="spoken instructions")
    whole.add_argument("--natural", type=Path, help="pool of natural Mandarin (see natural_pool)")
    whole.add_argument("--init", type=Path, help="go on from this model")
    whole.add_argument(
        "--one-after-another", action="store_true", help="speech first, then the agent: for few cores"
    )
    whole.add_argument("--agent", default="", help="more options for `agent`, as one string")
    out = command("export", export)
    out.add_argument("--run", dest="source", type=Path, required=True)
    return main


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point."""
    options = parser().parse_args(arguments)
    return options.run(options)


if __name__ == "__main__":
    raise SystemExit(main())
