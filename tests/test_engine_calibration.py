"""Calibration batches come from calibration items and go into the model as they are."""

import pytest
import tiny_models
import torch
from PIL import Image

from labkit import phonetap
from labkit.calibration import calibration_batches
from labkit.errors import LabError
from labkit.models.processors import TemplateProcessor


class PlainItem:
    def messages(self):
        parts = [{"type": "image", "image": Image.new("RGB", (56, 84))}, {"type": "text", "text": "tap"}]
        return [{"role": "user", "content": parts}]


def test_batches_are_calibration_items_that_the_model_takes(monkeypatch):
    asked = {}

    def items(**wanted):
        asked.update(wanted)
        return [PlainItem()] * wanted["count"]

    monkeypatch.setattr(phonetap, "items", items, raising=False)
    processor = TemplateProcessor(tiny_models.tokenizer(), tiny_models.image_processor())
    batches = list(calibration_batches(processor, 3, split="typed", seed=5))
    assert asked == {"split": "typed", "count": 3, "seed": 5, "part": "calibration"}
    with torch.inference_mode():
        logits = tiny_models.glm4v()(**batches[2]).logits
    assert len(batches) == 3
    assert logits.shape[:2] == batches[2]["input_ids"].shape


def test_no_items_are_refused():
    with pytest.raises(LabError, match="count is 0"):
        list(calibration_batches(None, 0))
