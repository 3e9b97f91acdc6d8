"""The joint training of the agent, in one process or in one a GPU."""

from __future__ import annotations

import argparse
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

import torch
from torch import distributed

from labkit.models.pocket.glm4v import split_as_glm
from labkit.models.pocket.training.batches import (
    PLAIN_SIZES,
    SIZES,
    BatchSource,
    SourceSettings,
    load_utterances,
)
from labkit.models.pocket.training.checks import spoken_checks, typed_checks
from labkit.models.pocket.training.feed import Feed
from labkit.models.pocket.training.runs import Log, load_init, new_model
from labkit.models.pocket.training.speech import SpeechPool
from labkit.models.pocket.training.tokenizer import tokenizer_of
from labkit.models.pocket.training.trainer import Trainer

SAVE_SECONDS = 60


class Clock:
    """Seconds since training began, the same in all processes: they agree on it every few steps."""

    def __init__(self, device: torch.device, every: int = 20) -> None:
        self.device, self.every, self.began, self.agreed = device, every, time.monotonic(), 0.0

    def elapsed(self, step: int) -> float:
        """Seconds; call it with every step."""
        if not distributed.is_initialized():
            return time.monotonic() - self.began
        if step % self.every == 0:
            shared = torch.tensor(time.monotonic() - self.began, dtype=torch.float64, device=self.device)
            distributed.broadcast(shared, 0)
            self.agreed = float(shared)
        return self.agreed


class Agenda:
    """Which kind and size of batch comes next where several processes train: the same for all of them."""

    def __init__(self, settings: SourceSettings) -> None:
        self.settings, self.rng = settings, random.Random(settings.seed)

    def __call__(self) -> tuple[str, int]:
        spoken = self.settings.speech_index is not None and self.rng.random() < self.settings.spoken_share
        if not spoken and self.rng.random() < self.settings.text_share:
            return "text", -1
        size = self.rng.choices(range(len(self.settings.sizes)), self.settings.sizes.values())[0]
        return "spoken" if spoken else "typed", size


def train_agent(options: argparse.Namespace) -> int:
    """The joint training; see the module's docstring."""
    rank = int(os.environ.get("RANK", 0))
    log = Log(options.output / "log.jsonl") if rank == 0 else lambda record: None
    tokenizer = tokenizer_of(options.init)
    if options.size.startswith("glm4v"):
        split_as_glm(tokenizer)
    if rank == 0:
        tokenizer.save_pretrained(options.output)
    model, encoder = new_model(options.size, tokenizer)
    can_hear = hasattr(model.config, "speech_config")
    sizes = SIZES if can_hear else PLAIN_SIZES
    checks = {"typed": typed_checks(encoder, options.validation, list(sizes))}
    if can_hear:
        checks["spoken"] = spoken_checks(encoder, model.config, options.validation)
    index = options.ear / "utterances.jsonl" if options.ear else None
    if options.processes > 1 and index is not None and not index.exists():
        raise SystemExit(f"error: several processes cannot wait for an ear, and {index} is not there")
    if options.processes > 1 and options.eye_seconds:
        raise SystemExit("error: the eye learns alone in one process only")
    settings = SourceSettings(
        workers=options.workers, slots=options.slots, first_slots=options.first_slots, rounds=options.rounds,
        batch=options.batch, questions=options.questions, seed=options.seed, speech_index=index,
        spoken_share=options.spoken_share, eye_seconds=options.eye_seconds, sizes=sizes,
    )  # fmt: skip
    source = BatchSource(encoder, settings, rank)
    try:
        device = take_place(options, rank)
        torch.set_float32_matmul_precision("high")
        trainer = Trainer(model, encoder, device=device, rate=options.rate, compile_layers=options.compile)
        if options.init:
            load_init(model, trainer.heads, options.init)
        if index is not None and index.exists():
            take_ear(trainer, options, log)
        _run(options, trainer, source, checks, rank, log)
    finally:
        source.close()
        if distributed.is_initialized():
            distributed.destroy_process_group()
    return 0


def _run(options, trainer: Trainer, source: BatchSource, checks: dict, rank: int, log: Callable) -> None:
    """Steps until the time or their number is up; the first process checks, logs and saves."""
    generator = torch.Generator(device=trainer.device).manual_seed(options.seed + 100 * rank)
    trainer.random.seed(options.seed + 100 * rank)
    feed, agenda, clock = Feed(source, trainer.device), Agenda(source.settings), Clock(trainer.device)
    sums: dict[str, list[torch.Tensor]] = {}
    step, waited, saved, on_plateau = 0, 0.0, time.monotonic(), bool(options.fall)

    def check() -> None:
        for kind, batches in checks.items():
            log({"step": step, "seconds": elapsed, "check": kind, **trainer.evaluate(batches)})

    while True:
        elapsed = clock.elapsed(step)
        progress = step / options.steps if options.steps else elapsed / options.seconds
        if progress >= 1:
            break
        asked = time.monotonic()
        batch, data = feed.take(*agenda()) if distributed.is_initialized() else feed.take()
        waited += time.monotonic() - asked
        if batch.kind == "spoken" and trainer.pool is None:
            take_ear(trainer, options, log)
        rise = min(1.0, (step + 1) / options.warmup)
        fall = min(1.0, max(0.02, (1 - progress) / options.fall)) if options.fall else 1.0
        if rank == 0 and on_plateau and fall < 1:
            trainer.save(options.output / "plateau")
            on_plateau = False
        for name, value in trainer.step(batch, data, rise * fall, generator).items():
            sums.setdefault(f"{batch.kind}.{name}", []).append(value)
        step += 1
        if step % options.log_every == 0:
            means = {
                name: float(torch.stack([v.float() for v in each]).mean()) for name, each in sums.items()
            }
            log({"step": step, "seconds": elapsed, "waited": waited, "factor": rise * fall, **means})
            sums = {}
        if rank == 0 and step % options.check_every == 0:
            check()
        if rank == 0 and time.monotonic() - saved > SAVE_SECONDS:
            trainer.save(options.output)
            saved = time.monotonic()
    if rank == 0:
        check()
        trainer.save(options.output)
        log({"step": step, "seconds": elapsed, "finished": True})


def take_place(options: argparse.Namespace, rank: int) -> torch.device:
    """This process's device, after it has met the others. Nothing may use the GPU before the workers are forked."""
    device = torch.device(options.device)
    if device.type == "cuda":
        device = torch.device("cuda", rank if options.processes > 1 else device.index or 0)
        torch.cuda.set_device(device)
    if options.processes > 1:
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def take_ear(trainer: Trainer, options: argparse.Namespace, log: Callable) -> None:
    """The trained ear, or the model's own, and what it shall hear."""
    rows = list(load_utterances(options.ear / "utterances.jsonl").rows)
    trainer.take_ear(options.ear, SpeechPool(options.pool, rows, trainer.device))
    log({"ear": len(rows)})


def start_processes(count: int, arguments: Sequence[str]) -> int:
    """Runs the training command in `count` processes that average their gradients; the first failure ends all."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-m", "labkit.models.pocket.training.train", *arguments]
    running = [
        subprocess.Popen(command, env={**os.environ, **shared, "RANK": str(rank)}) for rank in range(count)
    ]
    try:
        while (codes := [process.poll() for process in running]).count(None) and not any(codes):
            time.sleep(0.2)
        return next((code for code in codes if code), 0)
    finally:
        for process in running:
            process.terminate()
