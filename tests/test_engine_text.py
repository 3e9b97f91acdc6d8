"""From logits to tokens and from tokens to text, without a model."""

import pytest
import tiny_models
import torch

from labkit.detokenize import Detokenizer, StopMatcher
from labkit.forward import collate
from labkit.sampling import Sampler, SamplingSettings, distribution


def test_top_k_keeps_the_likeliest():
    logits = torch.tensor([1.0, 4.0, 3.0, 2.0])
    kept = distribution(logits, SamplingSettings(temperature=1.0, top_k=2))
    assert kept.nonzero().flatten().tolist() == [1, 2]
    assert kept[1] / kept[2] == pytest.approx(2.71828, rel=1e-4)


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    for top_p, size in ((0.4, 1), (0.5, 1), (0.51, 2), (0.8, 2), (0.9, 3), (0.99, 4)):
        kept = distribution(probabilities.log(), SamplingSettings(temperature=1.0, top_p=top_p))
        assert int((kept > 0).sum()) == size
        assert kept.sum() == pytest.approx(1.0)


def test_sampled_frequencies_follow_the_distribution():
    logits = torch.tensor([0.0, 1.0, 2.0])
    sampler = Sampler(SamplingSettings(temperature=2.0, seed=0))
    counts = torch.bincount(torch.stack([sampler(logits) for _ in range(4000)]), minlength=3) / 4000
    assert torch.allclose(counts, (logits / 2).softmax(0), atol=0.03)


def test_low_temperature_is_nearly_greedy():
    logits = torch.tensor([0.0, 1.0, 0.9])
    sampler = Sampler(SamplingSettings(temperature=0.005, seed=0))
    assert {int(sampler(logits)) for _ in range(50)} == {1}


@pytest.mark.parametrize("text", ["打开设置", "naïve café 😀 ok", "plain", "Ω≈ç√∫˜µ≤"])
def test_bytes_of_a_character_come_together(text):
    words = tiny_models.tokenizer()
    tokens = words(text, add_special_tokens=False)["input_ids"]
    detokenizer = Detokenizer(words)
    pieces = [detokenizer.push(token) for token in tokens]
    assert "".join(pieces) == text
    assert len(tokens) == len(text.encode())
    assert [piece for piece in pieces if piece] == list(text)


def test_special_tokens_and_broken_bytes_leave_no_trace():
    words = tiny_models.tokenizer()
    ids = words("设a", add_special_tokens=False)["input_ids"]
    detokenizer = Detokenizer(words)
    tokens = [ids[0], ids[3], words.convert_tokens_to_ids("<|user|>"), ids[1], ids[3], *ids]
    assert "".join(detokenizer.push(token) for token in tokens) == "aa设a"


def test_a_stop_string_over_several_pieces_is_found_and_nothing_of_it_given_out():
    stops = StopMatcher(["</answer>", "END"])
    assert [stops.push(piece) for piece in ("a<", "/ans", "wer", ">b")] == ["a", "", "", ""]
    assert stops.stopped
    assert stops.flush() == ""


def test_a_false_beginning_of_a_stop_string_is_given_out_late():
    stops = StopMatcher(["</answer>"])
    assert [stops.push(piece) for piece in ("x</", "b>", "</an")] == ["x", "</b>", ""]
    assert stops.flush() == "</an"
    assert not stops.stopped


def test_the_earliest_of_two_stop_strings_wins():
    stops = StopMatcher(["bc", "abcd"])
    assert stops.push("xxab") == "xx"
    assert stops.push("cd") == ""
    assert stops.stopped


def test_prompts_are_padded_on_the_left_and_recordings_on_the_right():
    short = {"input_ids": torch.tensor([[5, 6]]), "attention_mask": torch.ones(1, 2, dtype=torch.long)}
    long = {
        "input_ids": torch.tensor([[7, 8, 9]]),
        "attention_mask": torch.ones(1, 3, dtype=torch.long),
        "mm_token_type_ids": torch.tensor([[0, 1, 0]]),
        "input_features": torch.ones(1, 4),
    }
    longer = {**long, "input_features": torch.ones(2, 6)}
    batch = collate([short, long, longer], pad_token_id=1)
    assert batch["input_ids"].tolist() == [[1, 5, 6], [7, 8, 9], [7, 8, 9]]
    assert batch["attention_mask"].tolist() == [[0, 1, 1], [1, 1, 1], [1, 1, 1]]
    assert batch["mm_token_type_ids"].tolist() == [[0, 0, 0], [0, 1, 0], [0, 1, 0]]
    assert batch["input_features"].shape == (3, 6)
    assert batch["input_features"][0].tolist() == [1, 1, 1, 1, 0, 0]
