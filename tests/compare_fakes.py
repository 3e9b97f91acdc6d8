"""Small stand-ins for a model, its items and its cost: the orchestration is tested without torch.

Run as a script, this is a measuring process with those parts: ``python compare_fakes.py`` reads a request.
"""

import json
import os
import sys
import time
from dataclasses import dataclass
from types import SimpleNamespace

from labkit.common.actions import Action, format_action, parse_answer
from labkit.results.measurement import Measurement

HITS = {"fp32": 10, "int8": 10, "int4": 6}
BYTES = {"fp32": 4000, "int8": 1100, "int4": 700}


@dataclass(frozen=True)
class FakeItem:
    """An item whose target is the box around (100 + number, 200)."""

    number: int

    @property
    def id(self):
        return f"{self.split}-{self.number}"

    @property
    def split(self):
        return ("typed", "spoken", "hard")[self.number % 3]

    lang = "en"
    recording = None

    @property
    def target_kind(self):
        return None if self.number % 5 == 4 else "text"

    @property
    def instruction(self):
        return f"open number {self.number}"

    @property
    def action(self):
        return (
            Action("Back") if self.number % 5 == 4 else Action("Tap", {"element": (100 + self.number, 200)})
        )

    def messages(self):
        return [{"role": "user", "content": [{"type": "text", "text": str(self.number)}]}]


def fake_items(split="all", count=10, seed=None, part="test"):
    return [FakeItem(number) for number in range(count)]


def fake_score(item, text):
    action = parse_answer(text).action
    right = action == item.action
    wanted, got = item.action.point, action.point if action else None
    dx, dy = ((got[0] - wanted[0]) / 1000, (got[1] - wanted[1]) / 1000) if wanted and got else (None, None)
    return SimpleNamespace(
        parsed=action is not None,
        click=None if wanted is None else right,
        success=right,
        distance=None if dx is None else (dx * dx + dy * dy) ** 0.5,
        dx=dx,
        dy=dy,
    )


class FakeEngine:
    """Right for the first `hits` items, 50 to the right of the target for the others."""

    def __init__(self, hits, pause_s=0.0):
        self.hits, self.pause_s, self.batches = hits, pause_s, []

    def generate_batch(self, conversations, *, max_new_tokens, temperature, enable_thinking):
        self.batches.append(len(conversations))
        time.sleep(self.pause_s)
        return [self._answer(int(messages[0]["content"][0]["text"])) for messages in conversations]

    def generate(self, messages, **options):
        return self.generate_batch([messages], **options)[0]

    def _answer(self, number):
        action = FakeItem(number).action
        if number >= self.hits and action.point:
            action = Action("Tap", {"element": (action.point[0] + 50, action.point[1])})
        text = f"<answer>{format_action(action)}</answer>"
        return SimpleNamespace(text=text, completion_tokens=9, finish_reason="stop")


def fake_measure(plan):
    def measure(engine, items, *, enable_thinking=False):
        return {
            "weights_bytes": BYTES.get(plan, 2000),
            "bytes_by_role": {"decoder": BYTES.get(plan, 2000)},
            "peak_memory_bytes": 9000,
            "peak_memory_kind": "process peak RSS",
            "load_s": 0.5,
            "ttft_s": 0.2,
            "decode_tokens_per_s": 50.0,
            "answer_s": 0.4 if plan == "fp32" else 0.5,
            "samples": {"ttft_s": [0.2, 0.3], "answer_s": [0.4, 0.5], "decode_tokens_per_s": [50.0, 51.0]},
            "environment": {"threads": 1, "pid": os.getpid()},
        }

    return measure


def main():
    """As `labkit.measure.compare_worker.main`, with the parts above; some plan names misbehave on purpose."""
    from labkit.common.errors import LabError
    from labkit.measure import compare_worker

    def parts(request):
        plan = request["plan"]
        if plan == "refuses":
            raise LabError("this scheme needs a GPU")
        if plan == "breaks":
            raise RuntimeError("a bug")
        if plan == "dies":
            os._exit(3)
        print("a library that prints to standard output")
        pause_s = float(os.environ.get("FAKE_PAUSE_S", "0"))
        return {
            "load": lambda model, definition, device, work_folder, progress: FakeEngine(
                HITS.get(plan, 10), pause_s
            ),
            "items": fake_items,
            "measure": fake_measure(plan),
            "score": fake_score,
        }

    compare_worker._real_parts = parts
    return compare_worker.main()


def request_for(folder, plan="fp32", items=10, **changes):
    """What a measuring process is told."""
    return {
        "output": str(folder),
        "model": "fake",
        "model_source": "fake",
        "plan": plan,
        "definition": {"name": plan},
        "device": "cpu",
        "threads": 1,
        "seed": None,
        "split": "all",
        "items": items,
        "enable_thinking": False,
        "batch_size": 4,
        **json.loads(json.dumps(changes)),
    }


def measurements(*plans):
    """Finished measurements of the stand-ins, paired with the unquantized one."""
    from labkit.measure.quality import evaluate
    from labkit.results.comparison import Comparison
    from labkit.results.summary import summarize, summarize_groups

    rows = []
    for plan in plans:
        records = evaluate(FakeEngine(HITS[plan]), fake_items(), score=fake_score)
        cost = fake_measure(plan)(None, [])
        rows.append(
            Measurement(
                model="fake",
                plan=plan,
                device="cpu",
                split="all",
                splits=summarize_groups(records),
                samples={**cost.pop("samples"), "items": records},
                **summarize(records),
                **cost,
            )
        )
    return Comparison({}, rows).measurements


if __name__ == "__main__":
    sys.exit(main())
