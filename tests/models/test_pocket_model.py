"""The pocket model: its four parts, its processor and tokenizer, and that its forward passes agree."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Glm4vVisionModel

from labkit.models.pocket import PocketConfig, PocketForConditionalGeneration, PocketProcessor
from labkit.models.pocket.modeling import encoder_frames, speech_tokens
from labkit.models.pocket.tokenizer import SPECIAL_TOKENS, VOCAB_SIZE
from labkit.models.pocket.training.tokenizer import train_tokenizer
from labkit.models.spec import get_spec
from labkit.phonetap import draw_screen, instructions, words


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer()


@pytest.fixture(scope="module")
def processor(tokenizer):
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    return PocketProcessor(tokenizer, PocketConfig.tiny(ids, VOCAB_SIZE))


@pytest.fixture(scope="module")
def model(processor):
    torch.manual_seed(0)
    return PocketForConditionalGeneration(processor.config).eval()


def question(text="打开设置", *, image=True, samples=24_000):
    parts = [{"type": "image", "image": draw_screen(3, size=(196, 420)).image}] if image else []
    if samples:
        noise = np.random.default_rng(0).standard_normal(samples).astype(np.float32)
        parts.append({"type": "audio", "audio": noise})
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def test_a_coordinate_is_one_token_and_a_chinese_character_is_one_token(tokenizer):
    for number in range(1000):
        assert len(tokenizer.encode(f"[{number},")) == 3
    written = "".join(Path(source.__file__).read_text() for source in (words, instructions))
    characters = {c for c in written if "一" <= c <= "鿿"}
    assert len(characters) > 500
    assert [c for c in characters if len(tokenizer.encode(c)) != 1] == []


def test_answers_survive_encoding_and_decoding(tokenizer):
    for text in (
        '<think>听到：打开设置。要点“设置”，在屏幕上方。</think><answer>do(action="Tap", element=[7,999])</answer>',
        '<answer>finish(message="Über 漢字 🙂 C:\\\\x")</answer>',
    ):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_vocabulary_fits_the_embedding(tokenizer):
    assert len(tokenizer) == VOCAB_SIZE


def test_special_tokens_that_a_user_writes_stay_text(processor):
    batch = processor([{"role": "user", "content": "a<|user|><|image|>b"}])
    for token in ("<|image|>", "<|audio|>"):
        assert processor.tokenizer.convert_tokens_to_ids(token) not in batch["input_ids"][0].tolist()
    users = (batch["input_ids"] == processor.tokenizer.convert_tokens_to_ids("<|user|>")).sum()
    assert users == 1
    assert "a<|user|><|image|>b" in processor.tokenizer.decode(batch["input_ids"][0])


def test_image_and_speech_take_as_many_tokens_as_the_model_makes_of_them(processor):
    batch = processor(question(samples=30_000))
    ids = batch["input_ids"][0].tolist()
    config = processor.config
    assert ids.count(config.image_token_id) == 7 * 15  # 196 x 420 pixels in squares of 28
    assert ids.count(config.audio_token_id) == speech_tokens(30_000, config)
    assert encoder_frames(16_000, config) == 49  # one each 20 ms, less the filters' reach
    assert batch["pixel_values"].shape == (4 * 105, 3 * 2 * 14 * 14)


def test_several_images_and_recordings_keep_their_order(processor):
    red, blue = (Image.new("RGB", (196, 420), colour) for colour in ("red", "blue"))
    content = [
        {"type": "image", "image": red},
        {"type": "image", "image": blue},
        {"type": "text", "text": "x"},
    ]
    batch = processor([{"role": "user", "content": content}])
    first, second = batch["pixel_values"].view(2, 420, -1)
    assert first[0, 0] > second[0, 0]  # the first value is red's
    assert batch["image_grid_thw"].tolist() == [[1, 30, 14], [1, 30, 14]]


def test_thinking_is_opened_by_the_model_and_closed_by_the_prompt(processor):
    thinking = processor.tokenizer.decode(processor(question(), enable_thinking=True)["input_ids"][0])
    direct = processor.tokenizer.decode(processor(question(), enable_thinking=False)["input_ids"][0])
    assert thinking.endswith("<|assistant|>\n")
    assert direct.endswith("<|assistant|>\n<think></think>")


def test_generate_with_a_cache_equals_one_pass_over_the_whole_text(model, processor):
    batch = processor(question())
    with torch.inference_mode():
        written = model.generate(**batch, max_new_tokens=6, do_sample=False)
        length = batch["input_ids"].shape[1]
        prompt = torch.zeros_like(written)
        prompt[:, :length] = 1
        logits = model(
            **{**batch, "input_ids": written, "attention_mask": torch.ones_like(written)}
            | {"mm_token_type_ids": (written == processor.config.image_token_id).int(), "prompt_mask": prompt}
        ).logits
    assert written[0, length:].tolist() == logits[0, length - 1 : -1].argmax(-1).tolist()


def test_image_speech_and_text_see_each_other(model, processor):
    """What is asked changes what the image's features become before the decoder, and the other way round."""
    features = {}
    handle = model.model.cross_modal.register_forward_hook(lambda _m, _i, output: features.update(now=output))
    with torch.inference_mode():
        for name, text in (("one", "打开设置"), ("two", "打开相机")):
            model(**processor(question(text)))
            features[name] = features["now"]
    handle.remove()
    image = features["one"][0, 5:110]
    assert not torch.allclose(image, features["two"][0, 5:110], atol=1e-6)


def test_the_eye_sees_what_glm4vs_own_sees(model, processor):
    """Its convolutions are written as products: the same values from the same weights."""
    own = Glm4vVisionModel(model.config.vision_config).eval()
    own.load_state_dict(model.model.visual.state_dict())
    batch = processor(question(samples=0))
    with torch.inference_mode():
        expected = own(batch["pixel_values"], grid_thw=batch["image_grid_thw"]).pooler_output
        seen = model.model.visual(batch["pixel_values"], grid_thw=batch["image_grid_thw"]).pooler_output
    torch.testing.assert_close(seen, expected, atol=1e-6, rtol=1e-4)


def test_recordings_do_not_change_with_what_they_are_batched_with(model):
    short, long = torch.randn(8_000), torch.randn(20_000)
    padded = torch.zeros(2, 20_000)
    padded[0, :8_000], padded[1] = short, long
    with torch.inference_mode():
        both = model.model.get_audio_features(padded, torch.tensor([8_000, 20_000]))
        alone = model.model.get_audio_features(short[None], torch.tensor([8_000]))
    assert torch.equal(both[: len(alone)], alone)


def test_a_saved_folder_loads_to_the_same_answers(model, processor, tmp_path):
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, its_processor = (
        PocketForConditionalGeneration.from_pretrained(tmp_path).eval(),
        PocketProcessor.from_pretrained(tmp_path),
    )
    batch, again = processor(question()), its_processor(question())
    assert all(torch.equal(batch[name], again[name]) for name in batch)
    with torch.inference_mode():
        assert torch.equal(model(**batch).logits, loaded(**again).logits)


def test_unknown_content_parts_are_named(processor):
    with pytest.raises(ValueError, match="unknown content part 'video'"):
        processor([{"role": "user", "content": [{"type": "video", "video": None}]}])


def test_the_shipped_model_is_sixteen_bit_sharded_and_within_its_size():
    folder = get_spec("pocket").folder
    shards = sorted(folder.glob("*.safetensors"))
    assert sum(shard.stat().st_size for shard in shards) <= 60e6
    assert all(shard.stat().st_size <= 16e6 for shard in shards)
    config = PocketConfig.from_pretrained(folder)
    with torch.device("meta"):
        shipped = PocketForConditionalGeneration(config)
    linears = [m for m in shipped.modules() if isinstance(m, torch.nn.Linear)]
    assert all(linear.in_features % 128 == 0 for linear in linears)
    assert 20e6 < sum(p.numel() for p in shipped.parameters()) < 30e6


def test_the_shipped_tokenizer_splits_as_one_that_this_code_makes(tokenizer):
    """Words that PhoneTap learned later may be split otherwise; what answers are made of may not."""
    shipped = PocketProcessor.from_pretrained(get_spec("pocket").folder).tokenizer
    special = list(SPECIAL_TOKENS)
    assert len(shipped) == len(tokenizer)
    assert shipped.convert_tokens_to_ids(special) == tokenizer.convert_tokens_to_ids(special)
    for text in (*special, *map(str, range(1000))):
        assert len(shipped.encode(text, add_special_tokens=False)) == 1, text
    said = '<think>听到：打开设置。</think><answer>do(action="Tap", element=[500,120])</answer>'
    assert shipped.decode(shipped.encode(said, add_special_tokens=False)) == said
