"""Indexes, ties and configurations of checkpoints: what contradicts itself is an error of one line."""

import json

import pytest
import tiny_models
import torch
import transformers
from checkpoint_models import HELLO, picture, save_llama
from safetensors.torch import load_file, save_file

from labkit.common.errors import LabError
from labkit.loading.load import load
from labkit.models import get_spec
from labkit.models.checkpoint import Checkpoint

INDEX = "model.safetensors.index.json"
NORM = "model.norm.weight"


def loaded(folder):
    return load(folder, "fp32", "cpu", progress=False)


def save(folder, name, tensors):
    save_file(
        {key: tensor.contiguous() for key, tensor in tensors.items()},
        folder / name,
        metadata={"format": "pt"},
    )


def weights_of(folder):
    return load_file(folder / "model.safetensors")


@pytest.fixture
def sharded(tmp_path):
    """A checkpoint of two shards."""
    weights = weights_of(save_llama(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    names = list(weights)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in halves.items():
        save(tmp_path, file, {name: weights[name] for name in part})
    index = {"weight_map": {name: file for file, part in halves.items() for name in part}}
    (tmp_path / INDEX).write_text(json.dumps(index))
    return tmp_path


def change_index(folder, change):
    path = folder / INDEX
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("", "is broken"),
        ("[]", "expected an object"),
        ("{}", "weight_map must be an object"),
        ('{"weight_map": []}', "weight_map must be an object"),
        ('{"weight_map": {}}', "weight_map must be an object"),
        ('{"weight_map": null}', "weight_map must be an object"),
        ('{"weight_map": {"a": 3}}', "a is in 3, which is no .safetensors file"),
        ('{"weight_map": {"a": null}}', "a is in None"),
        ('{"weight_map": {"a": ["b.safetensors"]}}', "which is no .safetensors file"),
        ('{"weight_map": {"a": "b.bin"}}', "a is in 'b.bin', which is no .safetensors file"),
        ('{"weight_map": {"a": "../b.safetensors"}}', "which is not in its folder"),
        ('{"weight_map": {"a": "/b.safetensors"}}', "which is not in its folder"),
        ('{"weight_map": {"a": "x/../../b.safetensors"}}', "which is not in its folder"),
        ('{"weight_map": {"a": "\\u0000.safetensors"}}', "which is not in its folder"),
        ('{"weight_map": {"a": "missing.safetensors"}}', r"has no missing\.safetensors"),
        ("[" * 5000, "is broken"),
        ("\udcff", "is broken"),
    ],
)
def test_a_malformed_index_is_an_error_of_one_line(sharded, body, message):
    (sharded / INDEX).write_bytes(body.encode(errors="surrogateescape"))
    with pytest.raises(LabError, match=message) as caught:
        loaded(sharded)
    assert "\n" not in str(caught.value)


def test_the_index_decides_which_of_two_copies_is_read(sharded):
    expected = loaded(sharded).model.get_parameter(NORM).clone()
    home = json.loads((sharded / INDEX).read_text())["weight_map"][NORM]
    for file in ("a.safetensors", "b.safetensors"):
        if file != home:
            save(sharded, file, load_file(sharded / file) | {NORM: torch.full((128,), 7.0)})
    assert torch.equal(loaded(sharded).model.get_parameter(NORM), expected)
    whole = Checkpoint(get_spec(sharded)).weights(torch.device("cpu"), progress=False)
    assert torch.equal(whole.get_parameter(NORM).float(), expected)


def test_a_tensor_that_its_shard_lacks_is_named(sharded):
    change_index(
        sharded, lambda names: names.update({NORM: next(f for f in set(names.values()) if f != names[NORM])})
    )
    with pytest.raises(LabError, match=rf"safetensors has no {NORM}, which {INDEX} places there"):
        loaded(sharded)


def test_a_tensor_that_the_index_does_not_list_is_missing(sharded):
    change_index(sharded, lambda names: names.pop(NORM))
    with pytest.raises(LabError, match=rf"lack 1 tensors .*{NORM}; not used are 1, such as {NORM}"):
        loaded(sharded)


def test_an_unlisted_scale_is_not_left_out_in_silence(sharded):
    name = "model.layers.0.mlp.up_proj.weight_scale"
    save(sharded, "a.safetensors", load_file(sharded / "a.safetensors") | {name: torch.ones(1)})
    with pytest.raises(LabError, match=rf"hold {name}, which belongs to"):
        loaded(sharded)


def test_two_sets_of_weights_in_a_folder_are_refused(sharded):
    save(sharded, "model.safetensors", {"a": torch.ones(1)})
    with pytest.raises(LabError, match="cannot be told which are meant"):
        loaded(sharded)


def test_shards_without_their_index_are_named(sharded):
    (sharded / INDEX).unlink()
    with pytest.raises(
        LabError, match=rf"has no model\.safetensors and no {INDEX}, only a\.safetensors, b\.safet"
    ):
        loaded(sharded)


def test_two_tensors_for_one_place_are_refused(tmp_path):
    weights = weights_of(save_llama(tmp_path))
    save(tmp_path, "model.safetensors", weights | {"norm.weight": torch.ones(128)})
    with pytest.raises(LabError, match=rf"hold {NORM} twice: as {NORM} and as norm\.weight"):
        loaded(tmp_path)


@pytest.mark.parametrize("order", [1, -1])
def test_a_tied_head_of_other_values_is_refused_and_of_equal_values_tied(tmp_path, order):
    weights = weights_of(save_llama(tmp_path, tie_word_embeddings=True))
    embedding = weights["model.embed_tokens.weight"]
    for head, same in ((embedding.clone(), True), (embedding * 0.5 + 1, False)):
        both = [*weights.items(), ("lm_head.weight", head)][::order]
        save(tmp_path, "model.safetensors", dict(both))
        if same:
            model = loaded(tmp_path).model
            assert torch.equal(model.lm_head.weight, embedding.float())
            assert model.lm_head.weight is model.model.embed_tokens.weight
            continue
        for read in (loaded, lambda folder: Checkpoint(get_spec(folder)).weights(torch.device("cpu"))):
            with pytest.raises(
                LabError, match=r"ties .* two different tensors: set tie_word_embeddings to false"
            ):
                read(tmp_path)


def test_a_tied_model_that_stores_its_head_alone_has_it_as_embedding(tmp_path):
    weights = weights_of(save_llama(tmp_path, tie_word_embeddings=True))
    embedding = weights.pop("model.embed_tokens.weight")
    save(tmp_path, "model.safetensors", weights | {"lm_head.weight": embedding})
    assert torch.equal(loaded(tmp_path).model.model.embed_tokens.weight, embedding.float())


def change_config(folder, name="config.json", **facts):
    path = folder / name
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(before | facts))


@pytest.mark.parametrize(
    "facts",
    [
        {"architectures": 3},
        {"architectures": [None]},
        {"architectures": [["x"]]},
        {"architectures": "LlamaForCausalLM"},
        {"model_type": ["llama"]},
        {"num_attention_heads": 0},
        {"num_attention_heads": "four"},
        {"num_key_value_heads": 0},
        {"hidden_size": -128},
        {"hidden_size": 10**30},
        {"num_hidden_layers": -1},
        {"vocab_size": None},
        {"vocab_size": "many"},
        {"hidden_act": "nonesuch"},
        {"rope_parameters": 5},
        {"rope_parameters": {"rope_type": "nonesuch"}},
        {"dtype": "float99"},
        {"eos_token_id": "end"},
        {"max_position_embeddings": "long"},
        {"head_dim": "x"},
        {"rms_norm_eps": "x"},
    ],
)
def test_a_configuration_that_builds_no_model_is_an_error_of_one_line(tmp_path, facts):
    change_config(save_llama(tmp_path), **facts)
    with pytest.raises(LabError) as caught:
        loaded(tmp_path).generate(HELLO, max_new_tokens=2)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("body", ["[]", "{", '{"max_new_tokens": "many"}'])
def test_a_broken_generation_config_is_an_error_of_one_line(tmp_path, body):
    (save_llama(tmp_path) / "generation_config.json").write_text(body)
    with pytest.raises(LabError, match=r"generation_config\.json") as caught:
        loaded(tmp_path)
    assert "\n" not in str(caught.value)


def with_rows(folder, rows):
    """The checkpoint, with fewer rows of embedding and head."""
    weights = weights_of(folder)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = weights[name][:rows]
    save(folder, "model.safetensors", weights)
    change_config(folder, vocab_size=rows, pad_token_id=None, eos_token_id=0)
    return folder


def test_a_tokenizer_of_a_larger_vocabulary_is_refused_at_loading(tmp_path):
    with_rows(save_llama(tmp_path), 60)
    with pytest.raises(LabError, match=r"tokenizer of .* has 256 tokens, the model 60"):
        loaded(tmp_path)


def test_an_added_token_that_the_model_lacks_is_refused_where_a_prompt_has_it(tmp_path, caplog):
    words = tiny_models.tokenizer()
    folder = with_rows(save_llama(tmp_path), words.convert_tokens_to_ids("<|assistant|>"))
    words.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    words.save_pretrained(folder)
    engine = loaded(folder)
    assert "no rows for 5 tokens of its tokenizer" in caplog.text
    assert engine.generate(HELLO, max_new_tokens=2).completion_tokens == 2
    words.chat_template += "<|assistant|>"
    words.save_pretrained(folder)
    with pytest.raises(LabError, match=r"the token 258 \('<\|assistant\|>'\), and .* has 0 to 257"):
        loaded(folder).generate(HELLO, max_new_tokens=2)


def test_a_text_only_gemma3n_answers_as_transformers_does(tmp_path):
    words = tiny_models.tokenizer()
    config = transformers.Gemma3nTextConfig(
        vocab_size=len(words),
        vocab_size_per_layer_input=len(words),
        hidden_size=64,
        intermediate_size=[128] * 4,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"] * 2,
        num_kv_shared_layers=2,
        hidden_size_per_layer_input=16,
        laurel_rank=8,
        activation_sparsity_pattern=[0.0] * 4,
        max_position_embeddings=256,
        bos_token_id=None,
        pad_token_id=0,
        eos_token_id=0,
    )
    model = tiny_models.random_model(transformers.Gemma3nForCausalLM, config)
    model.save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    engine = loaded(tmp_path)
    assert engine.modalities == frozenset()
    inputs = engine.prepare(HELLO)
    expected = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert engine.generate(HELLO, max_new_tokens=12).token_ids == expected.tolist()
    with pytest.raises(LabError, match="does not take image input; it takes text"):
        engine.generate([{"role": "user", "content": [{"type": "image", "image": picture()}]}])
