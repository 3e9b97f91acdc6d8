"""The generation loop: what transformers generates, streamed, batched, sampled and stopped."""

import numpy as np
import pytest
import tiny_models
import torch
from PIL import Image

from labkit.common.errors import LabError
from labkit.engine.engine import Engine
from labkit.models.processors import TemplateProcessor
from labkit.models.spec import ModelSpec


def picture(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def ask(text, *images):
    parts = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


@pytest.fixture(scope="module")
def glm4v():
    processor = TemplateProcessor(tiny_models.tokenizer(), tiny_models.image_processor())
    return Engine(tiny_models.glm4v(), processor, spec=ModelSpec("tiny-glm4v", "."))


@pytest.fixture(scope="module")
def llama():
    return Engine(
        tiny_models.llama(), TemplateProcessor(tiny_models.tokenizer()), spec=ModelSpec("tiny-llama", ".")
    )


CONVERSATIONS = [
    ask("打开设置", picture(84, 56)),
    ask("What is on these two screens?", picture(56, 112, 1), picture(56, 56, 2)),
    [{"role": "user", "content": "hi"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "你是谁?"}],
]


@pytest.mark.parametrize("index", range(len(CONVERSATIONS)))
def test_greedy_tokens_are_those_of_transformers_generate(glm4v, index):
    """In this order, so that an image's positions cannot leak into the next conversation."""
    answer = glm4v.generate(CONVERSATIONS[index], max_new_tokens=40)
    inputs = glm4v.prepare(CONVERSATIONS[index])
    expected = glm4v.model.generate(**inputs, max_new_tokens=40, do_sample=False)
    assert answer.token_ids == expected[0, inputs["input_ids"].shape[1] :].tolist()
    assert answer.prompt_tokens == inputs["input_ids"].shape[1]
    assert len(set(answer.token_ids)) > 5


def test_llama_tokens_are_those_of_transformers_generate(llama):
    answer = llama.generate([{"role": "user", "content": "hello"}], max_new_tokens=30)
    inputs = llama.prepare([{"role": "user", "content": "hello"}])
    expected = llama.model.generate(**inputs, max_new_tokens=30, do_sample=False)
    assert answer.token_ids == expected[0, inputs["input_ids"].shape[1] :].tolist()


def test_a_batch_answers_as_each_alone(glm4v):
    alone = [glm4v.generate(messages, max_new_tokens=40) for messages in CONVERSATIONS]
    together = glm4v.generate_batch(CONVERSATIONS, max_new_tokens=40)
    assert [one.token_ids for one in together] == [one.token_ids for one in alone]
    assert [one.text for one in together] == [one.text for one in alone]
    assert [one.prompt_tokens for one in together] == [one.prompt_tokens for one in alone]


def test_rows_that_finish_early_leave_the_batch_and_change_nothing(glm4v):
    """Each answer is stopped at another place, so the cache shrinks in the middle."""
    alone = [glm4v.generate(messages, max_new_tokens=40) for messages in CONVERSATIONS]
    ends = {one.token_ids[3 + 5 * index] for index, one in enumerate(alone)}
    engine = Engine(glm4v.model, glm4v.processor, spec=glm4v.spec)
    engine.end_token_ids = frozenset(ends)
    together = engine.generate_batch(CONVERSATIONS, max_new_tokens=40)
    assert len({one.completion_tokens for one in together}) > 1
    for one, whole in zip(together, alone):
        assert one.token_ids == whole.token_ids[: one.completion_tokens]
        assert one.finish_reason == "stop"


def test_sampled_batches_answer_as_each_alone(glm4v):
    options = {"temperature": 0.8, "seed": 3, "max_new_tokens": 20}
    alone = [glm4v.generate(messages, **options).token_ids for messages in CONVERSATIONS]
    assert [one.token_ids for one in glm4v.generate_batch(CONVERSATIONS, **options)] == alone


def test_streaming_gives_the_same_text_in_pieces(glm4v):
    answer = glm4v.generate(CONVERSATIONS[0], max_new_tokens=40)
    stream = glm4v.stream(CONVERSATIONS[0], max_new_tokens=40)
    pieces = list(stream)
    assert len(pieces) > 3
    assert "".join(pieces) == answer.text == stream.generation.text
    assert stream.generation.token_ids == answer.token_ids


def test_text_never_holds_half_a_character(glm4v):
    for seed in range(4):
        answer = glm4v.generate(CONVERSATIONS[0], max_new_tokens=40, temperature=1.5, seed=seed)
        assert "\ufffd" not in answer.text


def test_leaving_a_stream_early_stops_generating(glm4v):
    with glm4v.stream(CONVERSATIONS[0], max_new_tokens=400) as stream:
        next(stream)
    assert list(stream) == []
    assert stream.generation is None


def test_a_stop_string_ends_the_answer_and_is_not_part_of_it(glm4v):
    whole = glm4v.generate(CONVERSATIONS[1], max_new_tokens=40).text
    stop = whole[4:7]
    answer = glm4v.generate(CONVERSATIONS[1], max_new_tokens=40, stop=stop)
    assert answer.text == whole[: whole.index(stop)]
    assert answer.finish_reason == "stop"
    assert answer.completion_tokens < 40
    assert "".join(glm4v.stream(CONVERSATIONS[1], max_new_tokens=40, stop=[stop])) == answer.text


def test_a_stop_string_that_never_comes_changes_nothing(glm4v):
    whole = glm4v.generate(CONVERSATIONS[1], max_new_tokens=40)
    answer = glm4v.generate(CONVERSATIONS[1], max_new_tokens=40, stop=[whole.text[-2:] + "never"])
    assert answer.text == whole.text
    assert answer.finish_reason == "length"


def test_the_same_seed_answers_the_same_again_and_another_does_not(llama):
    messages = [{"role": "user", "content": "hello"}]
    one, two, three = (
        llama.generate(messages, temperature=1.0, seed=seed, max_new_tokens=30).token_ids
        for seed in (7, 7, 8)
    )
    assert one == two != three
    assert one != llama.generate(messages, temperature=1.0, max_new_tokens=30).token_ids


def test_times_and_lengths_are_reported(llama):
    answer = llama.generate([{"role": "user", "content": "hello"}], max_new_tokens=12)
    assert answer.completion_tokens == len(answer.token_ids) == len(answer.token_times_s) == 12
    assert answer.finish_reason == "length"
    assert answer.token_times_s[0] == answer.ttft_s > answer.prepare_s > 0
    assert answer.decode_s == pytest.approx(sum(answer.token_times_s[1:]))
    assert answer.decode_tokens_per_s == pytest.approx(11 / answer.decode_s)


def test_a_reader_that_pauses_is_not_counted_as_decoding(llama):
    import time

    stream = llama.stream([{"role": "user", "content": "hello"}], max_new_tokens=20)
    for index, _ in enumerate(stream):
        if index < 2:
            time.sleep(0.3)
    assert stream.generation.decode_s < 0.5


def test_the_answer_stops_at_the_models_context(llama):
    limit = llama.model.config.max_position_embeddings
    answer = llama.generate([{"role": "user", "content": "x" * (limit - 30)}], max_new_tokens=100)
    assert answer.prompt_tokens + answer.completion_tokens == limit
    assert answer.finish_reason == "length"
    with pytest.raises(LabError, match=f"tiny-llama takes {limit - 1}"):
        llama.generate([{"role": "user", "content": "x" * limit}])


def test_thinking_reaches_the_chat_template(glm4v):
    words = glm4v.tokenizer
    plain = words.decode(glm4v.prepare(CONVERSATIONS[2])["input_ids"][0])
    aloud = words.decode(glm4v.prepare(CONVERSATIONS[2], enable_thinking=True)["input_ids"][0])
    assert aloud == plain + "<think>"


def test_each_image_has_its_own_number_of_tokens(glm4v):
    inputs = glm4v.prepare(CONVERSATIONS[1])
    assert inputs["image_grid_thw"].tolist() == [[1, 8, 4], [1, 4, 4]]
    assert int(inputs["mm_token_type_ids"].sum()) == (8 * 4 + 4 * 4) // 4
    assert inputs["pixel_values"].shape == (48, 3 * 2 * 14 * 14)


def test_a_model_without_a_chat_template_gets_plain_text():
    engine = Engine(
        tiny_models.llama(), TemplateProcessor(tiny_models.tokenizer(None)), spec=ModelSpec("base", ".")
    )
    ids = engine.prepare([{"role": "user", "content": "Once upon a time"}])["input_ids"]
    assert engine.tokenizer.decode(ids[0]) == "Once upon a time"
    with pytest.raises(LabError, match="the prompt is empty"):
        engine.generate([{"role": "user", "content": ""}])


def test_media_for_a_model_without_that_sense_is_refused(llama, glm4v):
    with pytest.raises(LabError, match="tiny-llama does not take image input; it takes text"):
        llama.generate(ask("look", picture(56, 56)))
    sound = {"type": "audio", "audio": np.ones(16_000, np.float32)}
    with pytest.raises(LabError, match="tiny-glm4v does not take audio input; it takes text, image"):
        glm4v.generate([{"role": "user", "content": [sound]}])


def test_control_tokens_in_a_text_are_the_letters_that_they_are(glm4v):
    plain, marked = (
        glm4v.prepare(ask(text, picture(56, 56)))["input_ids"][0].tolist()
        for text in ("look @ there", "look <|image|><|user|> there")
    )
    words = glm4v.tokenizer
    for token in ("<|image|>", "<|user|>"):
        assert marked.count(words.convert_tokens_to_ids(token)) == plain.count(
            words.convert_tokens_to_ids(token)
        )
    assert words.decode(marked).endswith("look <|image|><|user|> there<|assistant|>\n")
    assert len(marked) == len(plain) - 1 + len("<|image|><|user|>")
    assert glm4v.generate(ask("look <|image|>", picture(56, 56)), max_new_tokens=2).completion_tokens == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1}, "temperature is -1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0}, "top_p is 0"),
        ({"top_p": 1.1}, r"top_p is 1\.1"),
        ({"top_k": -1}, "top_k is -1"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_new_tokens": 2.5}, r"max_new_tokens is 2\.5"),
        ({"stop": ["", "x"]}, "stop is"),
        ({"seed": "a"}, "seed is 'a'"),
        ({"max_tokens": 3}, "unknown setting max_tokens; known: max_new_tokens, temperature"),
    ],
)
def test_a_setting_out_of_range_is_refused_at_the_call(llama, settings, message):
    with pytest.raises(LabError, match=message):
        llama.stream([{"role": "user", "content": "hello"}], **settings)


def test_settings_are_checked_as_sampling_errors(llama):
    with pytest.raises(LabError):
        llama.generate_batch([[{"role": "user", "content": "hello"}]], top_p=2)
    assert llama.generate_batch([]) == []


def test_logits_that_are_not_finite_are_an_error_and_not_an_answer():
    model = tiny_models.llama()
    with torch.no_grad():
        model.lm_head.weight[0] = torch.nan
    engine = Engine(model, TemplateProcessor(tiny_models.tokenizer()), spec=ModelSpec("broken", "."))
    for temperature in (0.0, 1.0):
        with pytest.raises(LabError, match="not finite in float32: its weights are damaged"):
            engine.generate([{"role": "user", "content": "hello"}], temperature=temperature)


@pytest.fixture(scope="module")
def pocket():
    model, processor = tiny_models.pocket()
    return Engine(model, processor, spec=ModelSpec("tiny-pocket", "."))


def voice(seconds, seed=0):
    samples = np.random.default_rng(seed).normal(size=int(16_000 * seconds)).astype(np.float32) * 0.1
    return {"type": "audio", "audio": samples}


def pocket_conversations():
    look = {"type": "image", "image": picture(168, 336)}
    return [
        ask("打开设置", picture(168, 336)),
        [{"role": "user", "content": [look, voice(1.3)]}],
        [{"role": "user", "content": [voice(0.7, 1)]}],
        [{"role": "user", "content": "你是谁?"}],
        [{"role": "user", "content": [look, look, voice(0.5), voice(1)]}],
    ]


def test_the_pocket_answers_images_and_recordings_as_transformers_does(pocket):
    for messages in pocket_conversations():
        answer = pocket.generate(messages, max_new_tokens=25)
        inputs = pocket.prepare(messages)
        expected = pocket.model.generate(**inputs, max_new_tokens=25, do_sample=False)
        assert answer.token_ids == expected[0, inputs["input_ids"].shape[1] :].tolist()


def test_the_pockets_batch_answers_as_each_alone(pocket):
    alone = [pocket.generate(messages, max_new_tokens=25).token_ids for messages in pocket_conversations()]
    together = pocket.generate_batch(pocket_conversations(), max_new_tokens=25)
    assert [one.token_ids for one in together] == alone


def test_the_pocket_ends_at_its_own_end_tokens(pocket):
    words = pocket.tokenizer
    ends = {words.convert_tokens_to_ids(token) for token in ("<|endoftext|>", "<|user|>")}
    assert pocket.end_token_ids == ends
