"""The lab's service beside ``transformers serve``, on the same model and machine: ``compare_servers.py MODEL``.

Throughput and time to first token of both, for one stream and for several at once. All servers are started, then asked
in turn, round after round; whoever is not asked is suspended, so that it takes nothing from the others. MODEL is a
folder that both load (`tests/peers/make_smollm2.py` makes one). Both decode greedily in the same dtype: the report says how
many answers are the same. Writes JSON with every sample.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from traffic import Request, Sample, quantile, send

from labkit.client import launch
from labkit.client.launch.start import _free_port
from labkit.common.files import atomic_path
from labkit.common.machine import environment

OUTPUT = Path(__file__).resolve().parents[2] / "assets/results/service/servers.json"
START_S = 300.0
CACHE_SHARE = 0.1  # of the free memory, for continuous batching's pages: by itself it takes nearly all, also from the others
DTYPES = {"bf16": "bfloat16", "fp32": "float32", "fp16": "float16"}
TOPICS = ("a lighthouse", "the tides", "a bicycle", "bread", "a violin", "snow", "a compass", "paper")
QUESTION = (
    "You write for a children's encyclopedia. Write a long article about {}: what it is, how it came to be, how it"
    " works, who uses it, and one thing about it that few people know. Use simple words and whole sentences."
)


class Server:
    """A server that has been started: asked by ``send``, otherwise suspended."""

    def __init__(self, name: str, base_url: str, model: str, pid: int):
        self.name, self.base_url, self.model, self._pid = name, base_url, model, pid

    def _family(self) -> list[psutil.Process]:
        process = psutil.Process(self._pid)
        return [process, *process.children(recursive=True)]

    @contextlib.contextmanager
    def awake(self) -> Iterator[None]:
        """The block in which it runs."""
        for process in self._family():
            process.resume()
        try:
            yield
        finally:
            self.suspend()

    def suspend(self) -> None:
        for process in self._family():
            process.suspend()

    def ask(self, streams: int, tokens: int, each: int) -> tuple[list[Sample], float]:
        """``each`` requests on each of so many streams; their samples, and the seconds that it took."""
        limits = {"max_tokens": tokens, "temperature": 0.0}
        turns = [{"role": "user", "content": QUESTION.format(topic)} for topic in TOPICS]
        requests = [
            Request(str(number), {"messages": [turns[number % len(turns)]], **limits})
            for number in range(streams * each)
        ]
        started = time.monotonic()
        samples = send(self.base_url, requests, streams, model=self.model)
        took = time.monotonic() - started
        failed = [one for one in samples if not one.is_whole]
        if failed:
            raise SystemExit(f"{self.name} failed: status {failed[0].status}, {failed[0].error}")
        return samples, took


@contextlib.contextmanager
def lab_server(model: str, plan: str, streams: int, threads: int) -> Iterator[Server]:
    """``labkit serve``."""
    told = ["--streams", str(streams), "--threads", str(threads)]
    with launch.start(model, plan, port=0, arguments=told, show=None) as service:
        server = Server(f"labkit {plan}", service.base_url, service.facts()["names"][0], service.pid)
        try:
            yield server
        finally:
            with contextlib.suppress(psutil.Error), server.awake():
                service.stop()


@contextlib.contextmanager
def transformers_server(model: str, dtype: str, threads: int, *more: str) -> Iterator[Server]:
    """``transformers serve``, kept from looking anything up elsewhere."""
    port = _free_port()
    command = [str(Path(sys.executable).with_name("transformers")), "serve", model, "--port", str(port)]
    command += ["--host", "127.0.0.1", "--device", "cpu", "--dtype", DTYPES[dtype], *more]
    environ = {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env={**environ, "HF_HUB_OFFLINE": "1"}, start_new_session=True
        )
        server = Server(
            " ".join(["transformers", dtype, *more[:1]]), f"http://127.0.0.1:{port}/v1", model, process.pid
        )
        try:
            _wait(f"http://127.0.0.1:{port}/health", process, log)
            yield server
        finally:
            for one in server._family():
                one.kill()
            process.wait()


def _wait(url: str, process: subprocess.Popen, log: Any) -> None:
    ends = time.monotonic() + START_S
    while time.monotonic() < ends:
        if process.poll() is not None:
            log.seek(0)
            raise SystemExit(f"transformers serve has ended:\n{log.read().decode(errors='replace')[-2000:]}")
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5):
            return
        time.sleep(0.5)
    raise SystemExit("transformers serve does not answer")


def summary_of(rounds: list[dict[str, Any]], server: str, streams: int) -> dict[str, Any]:
    """One line of the table."""
    mine = [one for one in rounds if (one["server"], one["streams"]) == (server, streams)]
    first = [ttft for one in mine for ttft in one["ttft_s"]]
    return {
        "server": server,
        "streams": streams,
        "tokens_per_s": statistics.median(one["tokens"] / one["seconds"] for one in mine),
        "tokens_per_s_rounds": [one["tokens"] / one["seconds"] for one in mine],
        "ttft_p50_s": quantile(first, 0.5),
        "ttft_p95_s": quantile(first, 0.95),
        "same_answers": statistics.mean(one["same_answers"] for one in mine),
    }


def measure(servers: list[Server], options: argparse.Namespace, count: Any) -> list[dict[str, Any]]:
    """Every server at every number of streams, round after round. The first server's first answers are the measure
    of ``same_answers``. ``count`` gives a text's tokens."""
    rounds: list[dict[str, Any]] = []
    reference: dict[str, str] = {}
    for number in range(options.rounds + 1):  # the first warms up
        for streams in options.streams:
            for server in servers:
                with server.awake():
                    samples, took = server.ask(streams, options.tokens, options.requests)
                if number == 0:
                    continue
                for one in samples:
                    reference.setdefault(one.name, one.text)
                rounds.append(
                    {
                        "round": number,
                        "server": server.name,
                        "streams": streams,
                        "seconds": took,
                        "tokens": sum(count(one.text) for one in samples),
                        "ttft_s": [one.ttft_s for one in samples],
                        "total_s": [one.total_s for one in samples],
                        "same_answers": statistics.mean(one.text == reference[one.name] for one in samples),
                    }
                )
    return rounds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="a folder that both load")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of both (bf16)")
    parser.add_argument("--plans", default="", metavar="A,B", help="also measure the lab under these plans")
    parser.add_argument("--streams", default="1,8", metavar="N,N", help="streams at once (1,8)")
    parser.add_argument("--requests", type=int, default=2, metavar="N", help="requests a stream (2)")
    parser.add_argument("--tokens", type=int, default=64, metavar="N", help="longest answer (64)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="rounds after a warm-up (3)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), metavar="N", help="CPU threads (all)")
    parser.add_argument("--output", type=Path, default=OUTPUT, metavar="FILE", help="the report (JSON)")
    options = parser.parse_args()
    options.streams = [int(one) for one in options.streams.split(",")]

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    most = max(options.streams)
    with contextlib.ExitStack() as stack:
        servers = []
        for plan in [options.dtype, *filter(None, options.plans.split(","))]:
            servers.append(stack.enter_context(lab_server(options.model, plan, most, options.threads)))
            servers[-1].suspend()
        paged = ("--continuous-batching", "--cb-max-memory-percent", str(CACHE_SHARE))
        for more in ((), paged):
            begun = transformers_server(options.model, options.dtype, options.threads, *more)
            servers.append(stack.enter_context(begun))
            servers[-1].suspend()
        rounds = measure(servers, options, lambda text: len(tokenizer(text).input_ids))
    table = [summary_of(rounds, one.name, streams) for one in servers for streams in options.streams]
    settings = {**vars(options), "model": Path(options.model).name, "output": options.output.name}
    report = {"environment": environment(), "settings": settings, "summary": table, "rounds": rounds}
    with atomic_path(options.output) as temporary:
        temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(
        f"{'server':40} {'streams':>7} {'tokens/s':>9} {'first token p50':>16} {'p95':>8} {'same answers':>13}"
    )
    for one in table:
        print(
            f"{one['server']:40} {one['streams']:7} {one['tokens_per_s']:9.1f} {one['ttft_p50_s']:14.2f} s"
            f" {one['ttft_p95_s']:6.2f} s {one['same_answers']:13.0%}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
