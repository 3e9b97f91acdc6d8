"""Calibration batches come from calibration items and go into the model as they are."""

import pytest
import tiny_models
import torch
from PIL import Image

from labkit import phonetap
from labkit.common.actions import Action
from labkit.common.errors import LabError
from labkit.engine.forward import Forward
from labkit.loading.calibration import calibration_batches, default_calibration, with_answer
from labkit.models.processors import TemplateProcessor


class PlainItem:
    def messages(self):
        parts = [{"type": "image", "image": Image.new("RGB", (56, 84))}, {"type": "text", "text": "tap"}]
        return [{"role": "user", "content": parts}]


class TapItem(PlainItem):
    action = Action("Tap", {"element": (12, 34)})


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


def test_the_right_answer_can_follow_the_prompt(monkeypatch):
    monkeypatch.setattr(phonetap, "items", lambda **wanted: [TapItem()] * wanted["count"], raising=False)
    processor = TemplateProcessor(tiny_models.tokenizer(), tiny_models.image_processor())
    [plain] = calibration_batches(processor, 1)
    [answered] = calibration_batches(processor, 1, answers=True)
    length = plain["input_ids"].shape[1]
    assert torch.equal(answered["input_ids"][:, :length], plain["input_ids"])
    answer = processor.tokenizer.decode(answered["input_ids"][0, length:])
    assert answer == '<answer>do(action="Tap", element=[12,34])</answer>'
    assert answered["attention_mask"].all()
    assert not answered["mm_token_type_ids"][0, length:].any()
    model = tiny_models.glm4v()
    with torch.inference_mode():
        torch.testing.assert_close(
            model(**answered).logits[:, : length - 1],
            model(**plain).logits[:, : length - 1],
            rtol=1e-3,
            atol=1e-3,
        )


def test_an_answer_behind_the_prompt_is_seen_as_decoding_sees_it():
    from labkit.engine.engine import Engine
    from labkit.models.spec import ModelSpec

    model, processor = tiny_models.pocket()
    engine = Engine(model, processor, spec=ModelSpec("tiny", "tiny"))
    item = phonetap.items("spoken", count=1, part="calibration")[0]
    written = engine.generate(item.messages(), max_new_tokens=12, temperature=1.0, seed=3)
    inputs = with_answer(engine.prepare(item.messages()), written.token_ids, processor)
    forward = Forward(model)
    row, first = forward.prefill(engine.prepare(item.messages()))
    one_by_one = [first[0], *(forward.step([row], torch.tensor([t]))[0] for t in written.token_ids[:-1])]
    with torch.inference_mode():
        together = model(**inputs).logits[0, -len(written.token_ids) - 1 : -1]
    torch.testing.assert_close(together, torch.stack(one_by_one), rtol=1e-3, atol=1e-3)


def test_the_head_is_shown_the_answer_and_the_end_of_the_prompt():
    model, processor = tiny_models.pocket()
    [batch] = default_calibration(processor, ("image", "audio"), 1, model=type(model))
    answered = int((batch["prompt_mask"] == 0).sum())
    assert batch["logits_to_keep"] == answered + 8
    with torch.inference_mode():
        assert model(**batch).logits.shape[1] == answered + 8
    [plain] = default_calibration(processor, ("image", "audio"), 1)
    assert "logits_to_keep" not in plain
    assert len(default_calibration(processor, ("image",), 3, model=model)) == 3


def test_a_model_without_eyes_has_no_standard_calibration():
    with pytest.raises(LabError, match="takes no images: pass calibration="):
        default_calibration(None, ("audio",), 1)


def test_no_items_are_refused():
    with pytest.raises(LabError, match="count is 0"):
        list(calibration_batches(None, 0))
