"""Which role a module plays, and which model a name means."""

import pytest
import tiny_models
import torch
import transformers
from torch import nn

from labkit.common.errors import LabError
from labkit.models import find_roles, get_spec, list_models
from labkit.models.families import FAMILIES, Family, has_role, roles_of_names


def on_meta(cls, config):
    with torch.device("meta"):
        return cls(config)


def count_by_role(model, roles):
    """Parameters of each role, ``other`` for norms and modules without a role; shared tensors count once."""
    counts = {}
    seen = set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in seen:
            continue
        seen.add(id(parameter))
        role = roles.get(name.rpartition(".")[0], "other")
        counts[role] = counts.get(role, 0) + parameter.numel()
    return counts


def test_glm4v_roles_follow_the_table():
    roles = find_roles(on_meta(transformers.Glm4vForConditionalGeneration, tiny_models.glm4v_config()))
    assert roles["model.visual.blocks.0.attn.qkv"] == "vision"
    assert roles["model.visual.patch_embed.proj"] == "vision"
    assert roles["model.visual.embeddings.position_embedding"] == "vision"
    assert roles["model.visual.merger.gate_proj"] == "projector"
    assert roles["model.visual.downsample"] == "projector"
    assert roles["model.language_model.layers.1.self_attn.q_proj"] == "decoder"
    assert roles["model.language_model.layers.0.mlp.gate_up_proj"] == "decoder"
    assert roles["model.language_model.embed_tokens"] == "embedding"
    assert roles["lm_head"] == "lm_head"


def test_the_9b_configuration_has_365_linears_of_which_124_are_vision():
    """The counts of the real checkpoint; the class's defaults are its sizes."""
    model = on_meta(transformers.Glm4vForConditionalGeneration, transformers.Glm4vConfig())
    roles = find_roles(model)
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    seen = [name for name in linears if name.startswith("model.visual.")]
    assert (len(linears), len(seen)) == (365, 124)
    assert sum(roles[name] == "vision" for name in linears) == 120
    assert sum(roles[name] == "projector" for name in linears) == 4
    parameters = count_by_role(model, roles)
    assert sum(parameters.values()) == pytest.approx(10.293e9, rel=1e-3)
    assert parameters["projector"] == pytest.approx(0.21e9, rel=0.05)
    assert parameters["lm_head"] == parameters["embedding"] == 151552 * 4096


@pytest.mark.parametrize("prefix", ["", "thinker."])
def test_qwen_omni_roles_with_and_without_the_thinker_prefix(prefix):
    family = next(one for one in FAMILIES if one.name == "Qwen2.5-Omni")
    names = {
        "model.audio_tower.conv1": "speech",
        "model.audio_tower.proj": "projector",
        "model.visual.blocks.3.attn.q": "vision",
        "model.visual.merger.mlp.0": "projector",
        "model.language_model.layers.27.mlp.down_proj": "decoder",
        "model.language_model.embed_tokens": "embedding",
        "lm_head": "lm_head",
    }
    expected = {prefix + name: role for name, role in names.items()}
    assert roles_of_names([*expected, "talker.model.embed_tokens", "token2wav.x.proj"], family) == expected


CAUSAL = {
    "LlamaForCausalLM": "LlamaConfig",
    "Qwen2ForCausalLM": "Qwen2Config",
    "Qwen3ForCausalLM": "Qwen3Config",
    "MistralForCausalLM": "MistralConfig",
    "GlmForCausalLM": "GlmConfig",
    "Glm4ForCausalLM": "Glm4Config",
}
MULTIMODAL = {
    "Phi4MultimodalForCausalLM": ("Phi4MultimodalConfig", {"vision", "speech", "projector", "decoder"}),
    "GlmAsrForConditionalGeneration": ("GlmAsrConfig", {"speech", "projector", "decoder"}),
    "Qwen2_5OmniThinkerForConditionalGeneration": (
        "Qwen2_5OmniThinkerConfig",
        {"vision", "speech", "projector", "decoder"},
    ),
}


@pytest.mark.parametrize("name", CAUSAL)
def test_text_models_are_decoder_embedding_and_head(name):
    sizes = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "vocab_size": 96}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0}
    config = getattr(transformers, CAUSAL[name])(**sizes, **heads)
    roles = find_roles(on_meta(getattr(transformers, name), config))
    assert set(roles.values()) == {"decoder", "embedding", "lm_head"}
    assert all(role == "decoder" for module, role in roles.items() if ".layers." in module)


@pytest.mark.parametrize("name", MULTIMODAL)
def test_every_module_of_the_other_families_has_a_role(name):
    config, expected = MULTIMODAL[name]
    model = on_meta(getattr(transformers, name), getattr(transformers, config)())
    roles = find_roles(model)
    assert set(roles.values()) == expected | {"embedding", "lm_head"}
    assert set(roles) == {module_name for module_name, module in model.named_modules() if has_role(module)}


def test_gemma3n_names_have_roles():
    """Its vision tower needs timm, so the text model and the audio encoder are built, the rest is named."""
    layers = {"num_hidden_layers": 5, "layer_types": ["full_attention"] * 5, "num_kv_shared_layers": 0}
    text = on_meta(transformers.Gemma3nForCausalLM, transformers.Gemma3nTextConfig(**layers))
    assert set(find_roles(text).values()) == {"decoder", "embedding", "lm_head"}
    audio = on_meta(
        transformers.Gemma3nAudioEncoder, transformers.Gemma3nAudioConfig(conf_num_hidden_layers=1)
    )
    names = [f"model.audio_tower.{name}" for name, module in audio.named_modules() if has_role(module)]
    family = next(one for one in FAMILIES if one.name == "Gemma3n")
    assert set(roles_of_names(names, family).values()) == {"speech"}
    roles = roles_of_names(
        ["model.vision_tower.timm_model.conv_stem.conv", "model.embed_vision.embedding_projection"], family
    )
    assert list(roles.values()) == ["vision", "projector"]


def test_an_unknown_transformers_architecture_is_an_error_that_names_modules():
    model = on_meta(
        transformers.MambaForCausalLM, transformers.MambaConfig(num_hidden_layers=1, hidden_size=64)
    )
    with pytest.raises(LabError, match=r"backbone\.embeddings.*Known families: Glm4v, pocket"):
        find_roles(model)


def test_a_module_that_is_no_transformers_model_has_no_roles():
    assert find_roles(nn.Sequential(nn.Linear(4, 4), nn.ReLU())) == {}


def test_the_first_pattern_wins():
    family = Family("x", ("x",), ((r"a\.b", "projector"), (r"a\..+", "vision")))
    assert roles_of_names(["a.b", "a.c"], family) == {"a.b": "projector", "a.c": "vision"}


def test_registered_models_come_with_the_pocket_first():
    assert [spec.name for spec in list_models()] == [
        "pocket",
        "pocket-glm4v",
        "autoglm-phone-9b",
        "autoglm-phone-9b-multilingual",
    ]
    assert get_spec("autoglm-phone-9b-multilingual").source == "zai-org/AutoGLM-Phone-9B-Multilingual"


def test_the_assets_folder_can_be_moved(tmp_path, monkeypatch):
    monkeypatch.setenv("LABKIT_ASSETS", str(tmp_path))
    assert get_spec("pocket").source == str(tmp_path / "pocket")
    assert get_spec("pocket").availability() == "missing"


def test_fonts_and_recordings_move_with_the_assets_folder(tmp_path, monkeypatch):
    from labkit.phonetap.drawing.fonts import fonts_folder
    from labkit.phonetap.recordings import recordings_folder

    monkeypatch.setenv("LABKIT_ASSETS", str(tmp_path))
    assert fonts_folder() == tmp_path / "fonts"
    assert recordings_folder() == tmp_path / "speech"


def test_a_folder_and_a_hub_id_are_models_too(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert get_spec(tmp_path).folder == tmp_path
    assert get_spec(str(tmp_path)).name == tmp_path.name
    assert get_spec("owner/some-model.v2").folder is None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pockt", r"no model is called 'pockt'\. Did you mean pocket\?.*autoglm-phone-9b"),
        ("./nowhere", r"the folder \./nowhere does not exist"),
        ("/no/such/folder", r"does not exist"),
        ("a/b/c", r"no model is called"),
        ("", r"known|no config|Known|is a"),
    ],
)
def test_an_unknown_model_is_an_error_that_lists_what_is_known(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LabError, match=message):
        get_spec(name)


def test_a_folder_without_config_is_refused(tmp_path):
    with pytest.raises(LabError, match=r"no config\.json"):
        get_spec(tmp_path)
