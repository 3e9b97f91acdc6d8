"""`labkit fit`: what a plan needs is said before anything is loaded, and is what is then needed."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.models.glm4v.configuration_glm4v import Glm4vConfig
from transformers.models.glm4v.modeling_glm4v import Glm4vTextModel, Glm4vVisionModel

import labkit
from labkit.anatomy import Anatomy, AnatomyError, dissect
from labkit.cards import CardError, find_card
from labkit.cli import main
from labkit.fitting import LIBRARY_BYTES, activation_bytes, needs


class Live(TorchDispatchMode):
    """The most bytes of tensors made inside that were alive at once."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.seen:
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                self.seen.add(key)
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.forget, key, size)
        return made

    def forget(self, key, size):
        self.seen.discard(key)
        self.now -= size


@pytest.fixture(scope="module")
def glm4v():
    """An anatomy with the proportions of Glm4v: only its configuration is looked at."""
    config = Glm4vConfig()
    config.vision_config.update(
        {"depth": 2, "hidden_size": 384, "num_heads": 3, "out_hidden_size": 1024, "intermediate_size": 3424}
    )
    config.text_config.update(
        {"num_hidden_layers": 2, "hidden_size": 1024, "num_attention_heads": 8, "intermediate_size": 3424}
    )
    config.text_config.rope_parameters = {
        "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 12, 12],
        "partial_rotary_factor": 0.5,
    }  # fmt: skip
    config.text_config.vocab_size = 256
    skeleton = type("Skeleton", (), {"config": config})()
    return Anatomy(
        None, skeleton, {}, type("Resolved", (), {"plan": labkit.QuantizationPlan.preset("bf16")})()
    )


def test_activations_of_the_eye_are_those_that_live_when_it_looks(glm4v):
    vision = Glm4vVisionModel._from_config(glm4v.skeleton.config.vision_config, dtype=torch.bfloat16).eval()
    rows, columns = 28, 40
    with torch.inference_mode(), Live() as live:
        vision(torch.randn(rows * columns, 1176), torch.tensor([(1, rows, columns)]))
    predicted = activation_bytes(glm4v, 1, rows * columns // 4)
    assert predicted == pytest.approx(live.peak, rel=0.1)


def test_activations_of_the_decoder_are_those_that_live_in_its_prefill(glm4v):
    text = Glm4vTextModel._from_config(glm4v.skeleton.config.text_config, dtype=torch.bfloat16).eval()
    tokens = 256
    with torch.inference_mode(), Live() as live:
        embeddings = torch.zeros(1, tokens, 1024, dtype=torch.bfloat16)
        text(
            inputs_embeds=embeddings, position_ids=torch.arange(tokens).expand(4, 1, tokens), use_cache=False
        )
    assert activation_bytes(glm4v, tokens, 0) == pytest.approx(live.peak, rel=0.1)


def test_weights_and_cache_are_those_that_are_counted():
    folder = "pocket"
    [need] = needs(folder, ["int4"], context=300, screen=(224, 476))
    engine = labkit.load(folder, "int4", progress=False)
    assert need.weights_bytes == engine.resolved.predicted_bytes
    anatomy = dissect(folder, "int4")
    assert need.cache_bytes == 300 * anatomy.kv_cache_bytes_per_token()
    assert need.total_bytes == (
        need.weights_bytes + need.cache_bytes + need.activation_bytes + need.workspace_bytes
    )


def test_fewer_bits_need_less_and_may_decode_faster():
    plans = ["fp32", "bf16", "int8-dynamic"]
    found = needs("autoglm-phone-9b", plans, context=4096)
    sizes = [need.total_bytes for need in found]
    assert sizes == sorted(sizes, reverse=True)
    speeds = [need.most_tokens_per_s(4.8e12) for need in found]
    assert speeds == sorted(speeds)
    assert 100 < speeds[0] < 140  # 41 GB less the eye and the embeddings at 4.8 TB/s
    assert all(need.workspace_bytes == LIBRARY_BYTES for need in found)  # nothing is unpacked


def test_a_longer_context_needs_more_cache_and_text_alone_no_eye():
    short, long = (needs("autoglm-phone-9b", ["bf16"], context=c)[0] for c in (4096, 25480))
    assert long.cache_bytes == 25480 * 40960  # bytes a token, as the model's configuration has it
    assert long.activation_bytes > short.activation_bytes
    text = needs("autoglm-phone-9b", ["bf16"], context=1000, screen=None)[0]
    assert text.activation_bytes < short.activation_bytes


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--memory", "lots"], "written 60MB or 5.5GB"),
        (["--card", "rtx4090"], "did you mean rtx-4090"),
        (["--memory", "8GB", "--screen", "big"], "write 1080x2400, or none"),
        (["--memory", "8GB", "--context", "1000"], "takes 3354 tokens, and the context has 1000"),
        (["--memory", "8GB", "--bandwidth", "0"], "above 0"),
        (["--memory", "8GB", "--plans", "int5"], "int5"),
    ],
)
def test_a_wrong_question_is_answered_with_what_is_wrong(given, said, capsys):
    assert main(["fit", "autoglm-phone-9b", *given]) == 2
    assert said in capsys.readouterr().err


def test_the_command_says_what_fits(capsys):
    assert (
        main(["fit", "autoglm-phone-9b", "--memory", "12GB", "--plans", "bf16,int4", "--bandwidth", "900"])
        == 0
    )
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.split()}
    assert "too much" in lines["bf16"]
    assert " yes " in lines["int4"]


def test_cards_are_found_by_their_makers_names():
    assert find_card("NVIDIA H200").name == "h200"
    assert find_card("RTX 4090").memory_bytes == 24 << 30
    with pytest.raises(CardError, match="Known: rtx-4060"):
        find_card("voodoo")
    with pytest.raises(AnatomyError, match="1 or more"):
        needs("pocket", ["bf16"], context=0)
