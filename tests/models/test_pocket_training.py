"""Training the pocket model, end to end at toy size, and that it trains the function that is shipped."""

import json
import random

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import PreTrainedTokenizerFast
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil

from labkit.models.pocket import PocketConfig, PocketForConditionalGeneration, PocketProcessor
from labkit.models.pocket.glm4v import save_processor, split_as_glm
from labkit.models.pocket.tokenizer import VOCAB_SIZE
from labkit.models.pocket.training import train as train_command
from labkit.models.pocket.training.batches import NEAR, SIZES, BatchMaker
from labkit.models.pocket.training.forward import BatchedForward
from labkit.models.pocket.training.losses import TrainingHeads, answer_loss, look_loss
from labkit.models.pocket.training.runs import load_state, new_model
from labkit.models.pocket.training.samples import TEXT_LENGTH, Encoder, SampleMaker, patch_overlap
from labkit.models.pocket.training.speech import write_texts
from labkit.models.pocket.training.text import IGNORE, PATCH, letters, letters_by_patch, text_by_token
from labkit.models.pocket.training.tokenizer import tokenizer_of, train_tokenizer
from labkit.models.pocket.training.trainer import Trainer
from labkit.models.processors import TemplateProcessor
from labkit.phonetap import words
from labkit.phonetap.drawing.canvas import Written

SIZE = min(SIZES)


@pytest.fixture(scope="module")
def encoder():
    return Encoder(train_tokenizer())


@pytest.fixture(scope="module")
def model(encoder):
    torch.manual_seed(0)
    return PocketForConditionalGeneration(PocketConfig.tiny(encoder.id, VOCAB_SIZE)).eval()


@pytest.fixture(scope="module")
def drawn(encoder):
    maker = BatchMaker(encoder, 5)
    return maker, [maker.draw(SIZE) for _ in range(12)]


def test_the_batched_forward_equals_the_models_own(encoder, model):
    maker = BatchMaker(encoder, 1)
    pixels, _ = maker.draw(SIZE)
    processor = PocketProcessor(train_tokenizer(), model.config)
    sound = np.random.default_rng(0).standard_normal(24_000).astype(np.float32)
    parts = [{"type": "image", "image": Image.fromarray(pixels)}, {"type": "audio", "audio": sound}]
    batch = processor([{"role": "user", "content": parts}])
    answer = torch.tensor([encoder('<answer>do(action="Tap", element=[123,456])</answer>')])
    ids = torch.cat([batch["input_ids"], answer], 1)
    prompt = batch["input_ids"].shape[1]
    prompt_mask = torch.zeros_like(ids)
    prompt_mask[:, :prompt] = 1
    columns, rows = SIZE[0] // PATCH, SIZE[1] // PATCH
    with torch.no_grad():
        expected = model(
            **{**batch, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
            | {"mm_token_type_ids": (ids == model.config.image_token_id).int(), "prompt_mask": prompt_mask}
        ).logits
        forward = BatchedForward(model)
        image, _ = forward.see(torch.from_numpy(pixels.copy())[None])
        audio = model.model.speech_projector(forward.hear(batch["input_features"], batch["audio_lengths"]))
        padded = torch.zeros(1, rows * columns + TEXT_LENGTH, dtype=torch.long)
        padded[:, : ids.shape[1]] = ids
        is_audio = padded == model.config.audio_token_id
        source = torch.where(is_audio, is_audio.cumsum(-1) - 1, -1)
        hidden, _, _ = forward(padded, torch.tensor([prompt]), image, audio, source, (rows, columns))
        logits = model.lm_head(hidden)[:, : ids.shape[1]]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_the_batched_forward_of_the_plain_model_equals_transformers(tmp_path):
    """Also that what is saved beside the weights makes the prompts that training shows."""
    tokenizer = split_as_glm(train_tokenizer())
    model, encoder = new_model("glm4v-tiny", tokenizer)
    pixels, drawn = BatchMaker(encoder, 1).draw(SIZE)
    save_processor(tokenizer, tmp_path)
    images = Glm4vImageProcessorPil.from_pretrained(tmp_path)
    processor = TemplateProcessor(PreTrainedTokenizerFast.from_pretrained(tmp_path), images)
    parts = [{"type": "image", "image": Image.fromarray(pixels)}, {"type": "text", "text": "点击设置"}]
    batch = processor([{"role": "user", "content": parts}])
    written = '<answer>do(action="Tap", element=[123,456])</answer>'
    image_tokens = drawn.cover.size
    ids, start = SampleMaker(encoder, random.Random(0)).sequence(image_tokens, 0, "点击设置", None, written)
    assert batch["input_ids"][0].tolist() == ids[:start]
    ids = torch.tensor([ids])
    with torch.no_grad():
        media = {name: batch[name] for name in ("pixel_values", "image_grid_thw")}
        kinds = (ids == model.config.image_token_id).int()
        expected = model.eval()(input_ids=ids, mm_token_type_ids=kinds, **media).logits
        forward = BatchedForward(model)
        image, _ = forward.see(torch.tensor(pixels)[None])
        padded = torch.nn.functional.pad(ids, (0, image_tokens + TEXT_LENGTH - ids.shape[1]))
        grid = (SIZE[1] // PATCH, SIZE[0] // PATCH)
        hidden, mixed, _ = forward(padded, torch.tensor([start]), image, grid=grid)
        logits = model.lm_head(hidden[:, : ids.shape[1]])
    assert mixed is None
    torch.testing.assert_close(logits, expected, atol=2e-4, rtol=1e-3)


def test_an_x_is_shown_slightly_off_half_of_the_time_and_its_targets_are_true(encoder, drawn):
    maker, screens = drawn
    arrays = maker.batch("typed", 0, [d for _, d in screens], 200).arrays
    off = []
    for ids, prompt, token, point_at in zip(*(arrays[n] for n in ("ids", "prompt", "token", "point_at"))):
        if point_at[0] >= 0:
            x, y = point_at
            shown, true = (encoder.number_of[int(tokens)] for tokens in (ids[prompt + x], token[x]))
            off.append(shown - true)
            assert ids[prompt + y] == token[y]
    assert 0 < sum(value != 0 for value in off) < len(off)
    assert max(map(abs, off)) <= NEAR


def test_answers_targets_and_coordinates_agree_with_the_screen(encoder, drawn):
    maker, screens = drawn
    batch = maker.batch("typed", 0, [d for _, d in screens], 64)
    arrays = batch.arrays
    taps = np.flatnonzero(arrays["point_at"][:, 0] >= 0)
    assert len(taps) > 20
    width, height = SIZE
    columns = width // PATCH
    for row in taps:
        x, y = (arrays["coordinate"][row, at] for at in arrays["point_at"][row])
        known = screens[arrays["slots"][row]][1]
        assert [x, y] in known.points.tolist()
        element = known.points.tolist().index([x, y])
        box = known.elements[element].box
        assert box[0] <= x / 1000 * width + 1 <= box[2] + 2
        cells = np.flatnonzero(arrays["pointed"][row])
        assert len(cells) >= 1
        near = patch_overlap(np.array([box], dtype=np.float32), SIZE)[0]
        assert near[cells].max() > 0, "the target's image tokens lie on its box"
        assert (cells // columns * PATCH < height).all()


def test_an_answer_is_predicted_from_the_token_before_it(encoder, drawn):
    maker, screens = drawn
    arrays = maker.batch("typed", 0, [d for _, d in screens], 8).arrays
    for ids, position, token, point_at in zip(*(arrays[n] for n in ("ids", "position", "token", "point_at"))):
        written = token != IGNORE
        written[point_at[0]] &= point_at[0] < 0  # a tap's x may be shown slightly off
        assert (ids[position[written] + 1] == token[written]).all()


def test_text_is_asked_for_where_it_is_drawn(encoder):
    line = Written("设置 Mail", (30.0, 42.0, 54.0, 58.0, 66.0, 70.0, 73.0, 76.0), 5.0, 17.0)
    at, tokens = text_by_token([line], (196, 420), encoder)
    found = {
        int(cell): [encoder.backend.decode([t]) for t in row if t != IGNORE] for cell, row in zip(at, tokens)
    }
    assert set(found) == {1, 2}
    assert found[1][:2] == ["设", "置"]
    assert " Mail" in found[2]


def test_a_patch_spells_the_letters_whose_middle_lies_in_it(encoder):
    """In the image processor's order: patches of one image token (2 x 2) stand together."""
    edges = (30.0, 41.0, 53.0, 58.0, 66.0, 70.0, 73.0, 76.0)
    at, classes = letters_by_patch([Written("设置 Mail", edges, 5.0, 17.0)], (196, 420))
    names = {number: letter for letter, number in letters().items()}
    found = {int(p): "".join(names[c] for c in row if c > 1) for p, row in zip(at, classes)}
    # middles: 设 35.5, 置 47, M 62, a 68, i 71.5, l 74.5; row 0 of patches; image token 1 holds columns 2 and 3
    assert found == {4: "设", 5: "置", 8: "Ma", 9: "il"}
    lower, _ = letters_by_patch([Written("M", (0.0, 8.0), 16.0, 26.0)], (196, 420))
    assert lower.tolist() == [2]


def test_patches_are_asked_to_spell_what_is_in_them_and_nothing_where_nothing_is(encoder, drawn):
    maker, screens = drawn
    arrays = maker.batch("eye", 0, [d for _, d in screens], 8).arrays
    for slot, at, spell in zip(arrays["slots"], arrays["spell_at"], arrays["spell"]):
        known = screens[slot][1]
        truth = dict(zip(known.letters_at.tolist(), known.letters.tolist()))
        for patch, row in zip(at.tolist(), spell.tolist()):
            assert row == truth.get(patch, [0, 0, 0, 0]) or (row == [IGNORE] * 4 and patch in truth)


def test_several_questions_share_a_screen(encoder, drawn):
    maker, screens = drawn
    arrays = maker.batch("typed", 0, [d for _, d in screens], 12, questions=3).arrays
    assert len(arrays["ids"]) == 12
    assert len(arrays["slots"]) == len(arrays["dense_at"]) == 4
    for row in np.flatnonzero(arrays["point_at"][:, 0] >= 0):
        x, y = (arrays["coordinate"][row, at] for at in arrays["point_at"][row])
        assert [x, y] in screens[arrays["slots"][row // 3]][1].points.tolist()


def test_the_losses_fall_to_nothing_when_the_model_is_right(encoder, model, drawn):
    """A hidden state that points at the right token costs (almost) nothing; attention on the target likewise."""
    maker, screens = drawn
    batch = maker.batch("typed", 0, [d for _, d in screens], 16)
    data = {name: torch.from_numpy(array) for name, array in batch.arrays.items()}
    weight = 50 * torch.eye(VOCAB_SIZE)
    hidden = torch.zeros(16, data["ids"].shape[1], VOCAB_SIZE)
    for row in range(16):
        for place, token in zip(data["position"][row].tolist(), data["token"][row].tolist()):
            if token != IGNORE:
                hidden[row, place, token] = 1
    _, parts = answer_loss(hidden, weight, data, torch.tensor(encoder.numbers))
    assert parts["token"] < 1e-3
    assert parts["tokens_right"] == 1
    assert parts["near"] == 1
    tokens = data["pointed"].shape[1]
    key = torch.zeros(16, data["ids"].shape[1], 2)
    key[:, 5 : 5 + tokens, 0] = data["pointed"].float() * 100
    query = torch.ones(16, data["ids"].shape[1], 2)
    looked = look_loss([(query, key)], data, 1.0, (0,))
    missed = look_loss([(query, -key)], data, 1.0, (0,))
    assert looked < 1e-3 < 50 < missed


def test_training_steps_lower_the_loss_on_the_same_batch(encoder, drawn):
    torch.manual_seed(0)
    fresh = PocketForConditionalGeneration(PocketConfig.tiny(encoder.id, VOCAB_SIZE))
    trainer = Trainer(fresh, encoder, device=torch.device("cpu"), rate=2e-3, compile_layers=False)
    maker, screens = drawn
    batch = maker.batch("typed", 0, [d for _, d in screens], 4)
    batch.arrays["pixels"] = np.stack([screens[slot][0] for slot in batch.arrays["slots"]])
    data = {name: torch.from_numpy(array) for name, array in batch.arrays.items()}
    generator = torch.Generator().manual_seed(0)
    history = [trainer.step(batch, data, 1.0, generator) for _ in range(12)]
    assert history[-1]["token"] < 0.7 * history[0]["token"]
    assert history[-1]["read"] < history[0]["read"]


@pytest.mark.slow
def test_one_command_trains_from_texts_to_a_folder_that_loads(tmp_path):
    """The whole training at toy size, the second part in two processes: texts, voices, ear, agent, export."""
    pytest.importorskip("espeakng_loader")
    agent = "--steps 6 --batch 4 --questions 2 --workers 1 --slots 16 --first-slots 16 --validation 2 --log-every 2"
    toy = ["--size", "tiny", "--device", "cpu", "--gpus", "2", "--one-after-another"]
    small = ["--count", "60", "--ear-seconds", "2", "--ear-batch", "8", "--eye-seconds", "0.5"]
    more = ["--agent", f"{agent} --no-compile --spoken-share 0.7"]
    assert train_command.main(["all", *toy, *small, *more, "--output", str(tmp_path)]) == 0
    logged = [json.loads(line) for line in (tmp_path / "agent" / "log.jsonl").read_text().splitlines()]
    names = {name for record in logged for name in record}
    assert {"spoken.ctc", "spoken.token", "near", "ear"} <= names
    assert all(np.isfinite(v) for record in logged for v in record.values() if isinstance(v, float))
    heard = [json.loads(line) for line in (tmp_path / "ear" / "log.jsonl").read_text().splitlines()]
    assert heard[-1]["letters_wrong"] > 0
    loaded = PocketForConditionalGeneration.from_pretrained(tmp_path / "model")
    assert {p.dtype for p in loaded.parameters()} == {torch.float16}
    last, plateau = (load_state(tmp_path / "agent" / name)[0] for name in (".", "plateau"))
    name = "model.language_model.layers.0.mlp.down_proj.weight"
    expected = 0.6 * last[name] + 0.4 * plateau[name]
    torch.testing.assert_close(loaded.state_dict()[name].float(), expected, atol=1e-4, rtol=2e-3)

    pool = ["--pool", str(tmp_path / "speech")]
    entry = json.loads((tmp_path / "model" / "tokenizer.json").read_text())
    entry["model"]["merges"].pop()
    (tmp_path / "model" / "tokenizer.json").write_text(json.dumps(entry))
    joined = ["--ear", str(tmp_path / "joined"), "--init", str(tmp_path / "model")]
    texts = ["--texts", str(tmp_path / "texts.jsonl"), "--output", str(tmp_path / "joined")]
    assert train_command.main(["join", "--size", "tiny", *pool, *texts]) == 0
    again = ["agent", *toy[:4], *pool, *joined, *more[1].split(), "--spoken-share", "1", "--warmup", "1"]
    assert train_command.main([*again, "--output", str(tmp_path / "again")]) == 0
    logged = [json.loads(line) for line in (tmp_path / "again" / "log.jsonl").read_text().splitlines()]
    assert any("spoken.ctc" in record for record in logged), "the exported model's own ear is trained on"
    tokens = [tokenizer_of(tmp_path / name).get_vocab() for name in ("model", "again")]
    assert tokens[0] == tokens[1], "weights keep the tokenizer that they were trained with"


def test_training_texts_never_contain_what_is_held_out(tmp_path):
    write_texts(tmp_path / "texts.jsonl", 2_000, seed=3)
    rows = [json.loads(line) for line in (tmp_path / "texts.jsonl").read_text().splitlines()]
    assert len(rows) == 2_000
    compounds = {
        words.join(lang, a, b)
        for (_, lang), (firsts, seconds) in words.COMPOUNDS.items()
        for a in firsts
        for b in seconds
    }
    concepts = {
        c
        for lang in words.LANGS
        for kind in ("app", "setting", "button", "tab")
        for c in words.concepts(kind, lang)
    }
    targets = {row["target"] for row in rows if row["task"] == "tap"}
    held_out = {t for t in targets if t in compounds - concepts and words.part_of(t) != "train"}
    assert not held_out


def test_heads_are_not_part_of_the_shipped_model(model):
    names = {name for name, _ in model.named_parameters()}
    assert not names & {name for name, _ in TrainingHeads(model.config).named_parameters()}
