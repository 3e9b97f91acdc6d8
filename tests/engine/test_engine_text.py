"""From logits to tokens and from tokens to text, without a model."""

import pytest
import tiny_models
import torch

from labkit.common.errors import LabError
from labkit.engine.detokenize import Detokenizer, StopMatcher
from labkit.engine.sampling import Sampler, SamplingSettings, distribution


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


def test_answers_that_share_their_texts_read_as_alone(monkeypatch):
    """Also when there is room for a few only, and when another answer was broken off within a character."""
    words = tiny_models.tokenizer()
    ids = words("设a设b", add_special_tokens=False)["input_ids"]
    monkeypatch.setattr("labkit.engine.detokenize.MOST_TEXTS", 5)
    texts = {}
    for tokens in (ids[:2], ids, ids[1:], ids[::-1], ids):
        alone, sharing = Detokenizer(words), Detokenizer(words, texts)
        assert [alone.push(token) for token in tokens] == [sharing.push(token) for token in tokens]
        assert len(texts) <= 5


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


def chosen(logits, settings, taken=(), prompt=(), ends=()):
    sampler = Sampler(settings, prompt_ids=prompt, end_token_ids=ends)
    for token in taken:
        sampler.accept(token)
    return int(sampler(torch.tensor(logits)))


def test_penalties_take_off_what_the_answer_has_already():
    logits = [5.0, 4.5, 1.0]
    assert chosen(logits, SamplingSettings(presence_penalty=1.0), taken=[0]) == 1
    assert chosen(logits, SamplingSettings(presence_penalty=0.4), taken=[0, 0]) == 0  # once, however often
    assert chosen(logits, SamplingSettings(frequency_penalty=0.4), taken=[0]) == 0
    assert chosen(logits, SamplingSettings(frequency_penalty=0.4), taken=[0, 0]) == 1
    assert chosen(logits, SamplingSettings(frequency_penalty=0.4), prompt=[0, 0]) == 0  # the prompt is free


def test_the_repetition_penalty_counts_the_prompt_and_pushes_down_both_signs():
    settings = SamplingSettings(repetition_penalty=2.0)
    assert chosen([5.0, 3.0], settings, prompt=[0]) == 1
    assert chosen([-1.0, -1.5], settings, taken=[0]) == 1
    assert chosen([5.0, 2.0], settings, taken=[0]) == 0


def test_a_bias_moves_a_token_and_no_end_comes_too_early():
    assert chosen([1.0, 0.0], SamplingSettings(logit_bias={1: 1.5})) == 1
    assert chosen([1.0, 0.0], SamplingSettings(logit_bias={0: -100})) == 1
    early = SamplingSettings(min_new_tokens=2)
    assert chosen([9.0, 0.0], early, taken=[1], ends=[0]) == 1
    assert chosen([9.0, 0.0], early, taken=[1, 1], ends=[0]) == 0


def test_log_probabilities_are_the_models_own():
    logits = torch.tensor([2.0, 1.0, 0.0])
    settings = SamplingSettings(logprobs=2, logit_bias={2: 100}, temperature=0.0)
    known = Sampler(settings).logprobs(logits, 2)
    expected = torch.log_softmax(logits, 0)
    assert known.token == 2
    assert known.logprob == pytest.approx(expected[2].item())
    assert [token for token, _ in known.top] == [0, 1]
    assert known.top[0][1] == pytest.approx(expected[0].item())
    assert Sampler(SamplingSettings()).logprobs(logits, 2) is None


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"frequency_penalty": 2.1}, "frequency_penalty is 2.1"),
        ({"presence_penalty": float("nan")}, "presence_penalty is nan"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
        ({"logit_bias": {3: 101}}, "logit_bias is"),
        ({"logit_bias": {-1: 0}}, "logit_bias is"),
        ({"logprobs": 21}, "logprobs is 21"),
        ({"logprobs": True}, "logprobs is True"),
        ({"stop_token_ids": (-1,)}, "stop_token_ids is"),
        ({"min_new_tokens": 9, "max_new_tokens": 8}, "min_new_tokens is 9"),
    ],
)
def test_penalties_and_biases_out_of_range_are_refused(settings, told):
    with pytest.raises(LabError, match=told):
        SamplingSettings(**settings)
