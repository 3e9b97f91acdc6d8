"""Training the pocket model's tokenizer."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from labkit.common.actions import COORDINATE_MAX
from labkit.models.pocket.tokenizer import _PATTERN, CHAT_TEMPLATE, MARKS, SPECIAL_TOKENS, VOCAB_SIZE
from labkit.phonetap import instructions, words


def corpus(seed: int = 0, sentences: int = 20_000) -> Iterator[str]:
    """What the vocabulary is trained on: numbers, labels, instructions, thoughts and answers."""
    rng = random.Random(seed)
    for _ in range(400):
        yield " ".join(str(number) for number in range(COORDINATE_MAX + 1))
    characters = {
        c for module in (words, instructions) for c in Path(module.__file__).read_text() if "一" <= c <= "鿿"
    }
    for character in sorted(characters):
        yield f"{character} " * 200
    for lang in words.LANGS:
        for firsts, seconds in (pair for key, pair in words.COMPOUNDS.items() if key[1] == lang):
            for word in (*firsts, *seconds):
                yield from [f"{word} {word}"] * 40
        for kind in ("app", "setting", "button", "tab"):
            yield from (f"{label} {label}" for label in words.concepts(kind, lang) for _ in range(40))
        for names in words.ICONS.values():
            yield from (name for name in names[lang] for _ in range(20))
        for task in instructions.FIXED_TASKS:
            for part in ("train", "test"):
                for _ in range(120):
                    item = instructions.fixed(rng, task, lang, part)
                    yield f"{item.text} {instructions.think(task, lang)} {item.action.arguments}"
        for _ in range(sentences):
            part = rng.choice(("train", "train", "test"))
            for item in instructions.spoken_texts(rng, lang, part, 1):
                thing = item.target or ""
                yield f"{item.text} {instructions.describe(thing, lang, rng.random())} {instructions.heard(item.text, lang)}"
    yield from [
        'do(action="Tap", element=[500,120])do(action="Swipe", start=[500,700], end=[500,300])'
    ] * 2000
    yield from [
        'do(action="Type", text="a")do(action="Launch", app="a")do(action="Back")do(action="Home")'
    ] * 2000
    yield from ['do(action="Wait", duration="2 seconds")finish(message="a")"'] * 2000


def tokenizer_of(folder: Path | None) -> PreTrainedTokenizerFast:
    """The tokenizer that a model's folder or a training run's has, else a new one.

    Weights belong to their tokenizer: words that were added to PhoneTap since would give a new one other tokens.
    """
    if folder is not None and (folder / "tokenizer.json").exists():
        return PreTrainedTokenizerFast.from_pretrained(folder)
    return train_tokenizer()


def train_tokenizer(vocab_size: int = VOCAB_SIZE) -> PreTrainedTokenizerFast:
    """Trains the tokenizer anew, `vocab_size` tokens in all; the same words give the same tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(MARKS), show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
    )  # fmt: skip
    tokenizer.train_from_iterator(corpus(), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>", padding_side="left",
        model_input_names=["input_ids", "attention_mask"], chat_template=CHAT_TEMPLATE, clean_up_tokenization_spaces=False,
    )  # fmt: skip
    fast.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in MARKS])
    return fast
