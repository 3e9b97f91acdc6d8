"""Keeps a service busy for a while, and says whether it stayed right: ``soak_service.py --seconds 600``.

A fresh service is asked every kind of thing by several connections at once: screens with typed and with spoken
requests, thinking, sampling with a seed, actions by grammar, plain text; some clients leave in mid-answer, some requests
are wrong. Each answer must be the one that was given alone, before. What is looked at: wrong answers, errors, memory
over time, places that never come free. Writes JSON, and ends with code 1 if the service failed.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from traffic import Request, Sample, quantile, send

from labkit import phonetap
from labkit.client import launch
from labkit.client.parts import as_openai
from labkit.common.machine import environment
from labkit.results.record import OpenRecord

OUTPUT = Path(__file__).resolve().parents[2] / "assets/results/service/soak.json"
WARM_SHARE = 0.1
"""Share of the time after which memory counts: by then everything that is kept has been made."""
IDLE_S = 10.0


def requests_of(items: int) -> list[Request]:
    """What is asked, in one round: about six requests an item, of which one is left and one is wrong."""
    found = [item for split in ("typed", "spoken", "hard") for item in phonetap.items(split, items)]
    made = []
    for number, item in enumerate(found):
        asked = {"messages": as_openai(item.messages()), "max_tokens": 256}
        made += [
            Request(item.split, asked),
            Request("thinking", {**asked, "enable_thinking": True, "return_reasoning": True}),
            Request("sampled", {**asked, "temperature": 0.7, "seed": number}),
            Request("action", {**asked, "response_format": {"type": "action"}}),
            Request("text", {"messages": [{"role": "user", "content": item.instruction}], "max_tokens": 64}),
            Request("left", {**asked, "enable_thinking": True, "return_reasoning": True}, leave_after=1),
            Request("wrong", {**asked, "max_tokens": -1}),
        ]
    return made


class MemoryWatch(threading.Thread):
    """Takes down a process's resident bytes once a second: ``samples`` of (seconds, bytes)."""

    def __init__(self, pid: int):
        super().__init__(daemon=True)
        self.samples: list[tuple[float, int]] = []
        self._process, self._over = psutil.Process(pid), threading.Event()

    def run(self) -> None:
        started = time.monotonic()
        while not self._over.wait(1.0):
            self.samples.append((round(time.monotonic() - started, 1), self._process.memory_info().rss))

    def stop(self) -> None:
        self._over.set()
        self.join()


def soak(service: launch.Service, requests: Sequence[Request], connections: int, seconds: float) -> dict:
    """The report: what was sent, what went wrong, memory, latencies."""
    model = service.facts()["names"][0]
    alone = [one for one in requests if one.name not in ("left", "wrong")]
    right = {id(one): send(service.base_url, [one], 1, model=model)[0] for one in alone}
    failed = [one.error for one in right.values() if not one.is_whole]
    if failed:
        raise SystemExit(f"asked alone, the service failed already: {failed[0]}")
    asked = itertools.cycle(requests)
    sent: list[Request] = []

    def taken_down():
        for one in asked:
            sent.append(one)
            yield Request(f"{len(sent) - 1}", one.body, one.leave_after)

    watch = MemoryWatch(service.pid)
    watch.start()
    started = time.monotonic()
    samples = send(service.base_url, taken_down(), connections, model=model, seconds=seconds)
    took = time.monotonic() - started
    watch.stop()
    idle = _left_over(service)
    again = send(service.base_url, alone[:1], 1, model=model)[0]
    verdicts = Counter(_verdict(sent[int(one.name)], one, right) for one in samples)
    whole = [one for one in samples if one.is_whole]
    return {
        "seconds": took,
        "requests": len(samples),
        "requests_per_s": len(samples) / took,
        "by_kind": dict(Counter(sent[int(one.name)].name for one in samples)),
        "verdicts": dict(verdicts),
        "wrong_answers": verdicts["wrong answer"],
        "errors": verdicts["error"],
        "first_errors": [one.error for one in samples if one.error and one.status != 400][:5],
        "left_over": idle,
        "right_afterwards": again.text == right[id(alone[0])].text,
        "ttft_s": _spread(one.ttft_s for one in whole if one.ttft_s is not None),
        "total_s": _spread(one.total_s for one in whole),
        "memory": memory_of(watch.samples, len(samples) / took),
    }


def _verdict(request: Request, sample: Sample, right: dict[int, Sample]) -> str:
    if request.name == "wrong":
        return "refused" if sample.status == 400 else "error"
    if request.leave_after is not None:
        return "left" if sample.left else "error"
    if not sample.is_whole:
        return "error"
    return "right answer" if sample.text == right[id(request)].text else "wrong answer"


def _left_over(service: launch.Service) -> dict[str, int]:
    """Answers that still run or wait some seconds after the last client has gone: places that hang."""
    ends = time.monotonic() + IDLE_S
    while True:
        facts = service.facts()
        left = {name: facts[name] for name in ("running", "waiting")}
        if not any(left.values()) or time.monotonic() > ends:
            return left
        time.sleep(0.2)


def memory_of(samples: Sequence[tuple[float, int]], requests_per_s: float) -> dict[str, Any]:
    """Resident bytes of the service: at the start, warm, at the end, at most; and how they grow once warm."""
    warm = samples[int(len(samples) * WARM_SHARE) :]
    times, sizes = np.array(warm, dtype=float).T
    slope = np.polyfit(times, sizes, 1)[0] if len(warm) > 1 else 0.0
    return {
        "start_bytes": samples[0][1],
        "warm_bytes": warm[0][1],
        "end_bytes": warm[-1][1],
        "peak_bytes": max(size for _, size in samples),
        "growth_bytes_per_request": float(slope / requests_per_s),
        "samples": [list(one) for one in samples],
    }


def _spread(values: Any) -> dict[str, float | None]:
    ordered = sorted(values)
    return {"p50": quantile(ordered, 0.5), "p95": quantile(ordered, 0.95), "max": quantile(ordered, 1.0)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="pocket", help="as for `labkit serve` (pocket)")
    parser.add_argument("--plan", default="int8", help="as for `labkit serve` (int8)")
    parser.add_argument("--seconds", type=float, default=600.0, metavar="S", help="how long (600)")
    parser.add_argument("--connections", type=int, default=8, metavar="N", help="clients at once (8)")
    parser.add_argument("--items", type=int, default=6, metavar="N", help="screens of each split (6)")
    parser.add_argument("--output", type=Path, default=OUTPUT, metavar="FILE", help="the report (JSON)")
    options = parser.parse_args()
    requests = requests_of(options.items)
    with launch.start(options.model, options.plan, port=0) as service:
        report = soak(service, requests, options.connections, options.seconds)
    settings = {**vars(options), "output": options.output.name}
    OpenRecord(report, settings=settings, environment=environment()).save(options.output)
    memory = report["memory"]
    print(
        f"{report['requests']} requests in {report['seconds']:.0f} s: {report['verdicts']}; left over"
        f" {report['left_over']}; memory {memory['warm_bytes'] / 1e6:.0f} MB warm, {memory['end_bytes'] / 1e6:.0f} MB"
        f" at the end; an answer takes {report['total_s']['p50']:.2f} s (p50), {report['total_s']['p95']:.2f} s (p95)"
    )
    good = not (report["wrong_answers"] or report["errors"] or any(report["left_over"].values()))
    return 0 if good and report["right_afterwards"] else 1


if __name__ == "__main__":
    sys.exit(main())
