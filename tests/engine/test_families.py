"""Small random models of transformers' families: the lab's greedy answers are transformers' own, or it refuses by name."""

import pytest
import tiny_models
import torch
import transformers

import labkit
from labkit.common.errors import LabError, LoadError
from labkit.engine.own_way import OwnForward
from labkit.engine.row_cache import RowCache
from labkit.engine.trial import check_family, try_family
from labkit.models.twin import STD, WINDOW, shrunk

PROMPTS = (5, 13, 21)  # tokens: below, across and beyond the windows and short contexts of `shrunk`
NEW_TOKENS = 12

LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 2 * WINDOW}
ANSWERED = {
    "afmoe": {},
    "apertus": {},
    "arcee": {},
    "aria_text": {},
    "bloom": {},
    "cohere": {},
    "cohere2": {},
    "deepseek_v2": {"n_group": None, "topk_group": None, "num_experts_per_tok": 2, "topk_method": "greedy"},
    "deepseek_v3": {},
    "diffllama": {},
    "doge": {},
    "ernie4_5": {},
    "exaone4": {},
    "falcon": {},
    "gemma": {},
    "gemma2": {},
    "gemma3_text": {},
    "glm": {},
    "glm4": {},
    "glm4_moe": {},
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_oss": {},
    "granite": {},
    "granitemoe": {},
    "jetmoe": {},
    "llama": {},
    "llama4_text": {},
    "mimo_v2_flash": {},
    "minicpm3": {},
    "minimax": {},
    "mistral": {},
    "mixtral": {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2},
    "olmo2": {},
    "olmo3": {},
    "phi": {},
    "phi3": {},
    "phi4_multimodal": {},
    "phimoe": {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2},
    "qwen2": {},
    "qwen2_moe": {},
    "qwen3": {},
    "qwen3_moe": {},
    "qwen3_next": {},
    "seed_oss": {},
    "stablelm": {},
}
"""Family -> what its model's configuration says beside the defaults."""
REFUSED = (
    *("gpt_neox", "mamba", "mpt", "opt", "rwkv"),
    *("gemma3", "idefics3", "internvl", "llava", "qwen2_5_vl", "qwen2_vl", "qwen3_vl"),
)
ONE_BY_ONE = {"diffllama", "doge", "jetmoe"}
"""Families whose attention takes the cache's keys apart, so that rows cannot share a pass."""


def saved(folder, model):
    model.save_pretrained(folder)
    tiny_models.tokenizer().save_pretrained(folder)
    return folder


def random_model(model_class, config):
    torch.manual_seed(0)
    model = model_class(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, STD)
    return model


def family_model(name):
    config = transformers.CONFIG_MAPPING[name](**ANSWERED[name])
    return random_model(transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], shrunk(config))


def prompts():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(10, 60, (1, length), generator=generator) for length in PROMPTS]


def their_answer(model, prompt):
    tokens = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return tokens[0, prompt.shape[1] :].tolist()


def our_answers(engine, prompts):
    """Greedy answers to prompts of one batch."""
    batch = engine.batch(len(prompts))
    answers = [
        engine.request([], inputs={"input_ids": prompt}, max_new_tokens=NEW_TOKENS) for prompt in prompts
    ]
    for answer in answers:
        batch.add(answer)
    batch.run()
    return [answer.result().token_ids for answer in answers]


def loaded(folder):
    engine = labkit.load(folder, plan="fp32", device="cpu", progress=False)
    engine.end_token_ids = frozenset()
    return engine


@pytest.mark.parametrize("name", ANSWERED)
def test_greedy_answers_are_those_of_the_familys_own_generate_alone_and_together(tmp_path, name):
    model = family_model(name)
    engine = loaded(saved(tmp_path, model))
    asked = prompts()
    expected = [their_answer(model, prompt) for prompt in asked]
    assert len({token for answer in expected for token in answer}) > 2
    assert [our_answers(engine, [prompt])[0] for prompt in asked] == expected
    assert our_answers(engine, asked) == expected
    if name in ONE_BY_ONE:
        assert engine.forward.way == "single"


@pytest.mark.parametrize("name", REFUSED)
def test_a_family_that_is_not_known_is_refused_by_its_name_before_weights_are_read(tmp_path, name):
    config = transformers.CONFIG_MAPPING[name]()
    mapping = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    mapping = mapping if type(config) in mapping else transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    config.architectures = [mapping[type(config)].__name__]
    config.save_pretrained(tmp_path)
    tiny_models.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(LabError, match=name):
        labkit.load(tmp_path, plan="int8", device="cpu", weights="random", progress=False)


def longrope_model(model_class, config_class):
    config = config_class(
        vocab_size=272,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        original_max_position_embeddings=2 * WINDOW,
        pad_token_id=0,
        eos_token_id=0,
        rope_parameters={**LONGROPE, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8},
    )
    return random_model(model_class, config)


def test_phi3_keeps_a_prompt_beyond_its_short_context_and_begins_anew_where_an_answer_crosses_it(tmp_path):
    model = longrope_model(transformers.Phi3ForCausalLM, transformers.Phi3Config)
    engine = loaded(saved(tmp_path, model))
    assert isinstance(engine.forward, OwnForward)
    asked = prompts()
    expected = [their_answer(model, prompt) for prompt in asked]
    assert our_answers(engine, asked) == expected
    for prompt in asked:
        row, _ = engine.forward.prefill({"input_ids": prompt})
        assert row.length == prompt.shape[1]
        assert type(row.cache) is RowCache


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
        {**LONGROPE, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "factor": 8.0},
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_frequencies_that_grow_with_a_conversation_do_not_depend_on_the_others(tmp_path, rope):
    config = tiny_models.llama_config()
    config.hidden_size, config.head_dim, config.max_position_embeddings = 64, 16, 2 * WINDOW
    config.rope_parameters = rope
    model = random_model(transformers.LlamaForCausalLM, config)
    engine = loaded(saved(tmp_path, model))
    engine.max_length = None  # beyond max_position_embeddings, which is what "dynamic" is for
    asked = prompts()
    fresh = [transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32) for _ in asked]
    expected = [their_answer(model, prompt) for model, prompt in zip(fresh, asked)]
    longest_first = asked[::-1]
    assert our_answers(engine, longest_first) == expected[::-1]
    assert [our_answers(engine, [prompt])[0] for prompt in longest_first] == expected[::-1]


class StrangeLlama(transformers.LlamaForCausalLM):
    """Answers otherwise when it gets the lab's cache."""

    def forward(self, *args, past_key_values=None, **kwargs):
        output = super().forward(*args, past_key_values=past_key_values, **kwargs)
        if isinstance(past_key_values, RowCache):
            output.logits = output.logits.flip(-1)
        return output


def test_a_family_whose_twin_answers_otherwise_is_refused_by_its_name():
    config = tiny_models.llama_config()
    with pytest.raises(LoadError, match=r"family llama .StrangeLlama.*token 1 after a prompt of 4 tokens"):
        check_family(StrangeLlama, config)


def test_a_trial_is_made_once_and_leaves_the_callers_random_state():
    config = shrunk(transformers.DiffLlamaConfig())
    state = torch.random.get_rng_state()
    outcome = try_family(transformers.DiffLlamaForCausalLM, config)
    assert outcome.fault is None
    assert not outcome.joins
    assert try_family(transformers.DiffLlamaForCausalLM, config) is outcome
    assert torch.equal(torch.random.get_rng_state(), state)
