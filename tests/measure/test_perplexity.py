"""Perplexity of plans beside each other, on a tiny language model."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_models
import torch
from tokenizers.processors import TemplateProcessing

from labkit.cli.main import main
from labkit.cli.perplexity import _change
from labkit.common.errors import LabError
from labkit.loading.datasets import DRAWN_FROM, PROBE_SEED, VALIDATION_SEED, Datasets
from labkit.measure.evaluator import PlanEvaluator
from labkit.measure.perplexity import Perplexities, compare_perplexity
from labkit.measure.probe import perplexity_of, sequence_losses
from labkit.plans.plan import PlanError

ROOT = Path(__file__).resolve().parents[2]
PLANS = "int4-8bit:group_size=32,int4-2bit:group_size=32,gptq-2bit:group_size=32"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    tiny_models.llama().save_pretrained(folder)
    tiny_models.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def datasets():
    return Datasets(calibration=6, probe=3, validation=12, text=str(ROOT / "LICENSE"), length=64)


@pytest.fixture(scope="module")
def measured(folder, datasets, tmp_path_factory):
    output = tmp_path_factory.mktemp("perplexity")
    return output, compare_perplexity(folder, PLANS, datasets=datasets, output=output, progress=False)


def test_losses_are_those_of_the_next_tokens():
    model = tiny_models.llama()
    ids = torch.randint(256, (5, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = [float(model(one[None], labels=one[None]).loss) for one in ids]
    losses = sequence_losses(model, ids, batch_size=2)
    assert losses == pytest.approx(expected, rel=1e-5)
    assert perplexity_of(losses) == pytest.approx(math.exp(sum(expected) / 5), rel=1e-5)


def test_plans_are_judged_beside_the_unquantized_model(measured):
    output, found = measured
    table = found.table()
    assert list(table.index) == ["unquantized", *PLANS.split(",")]
    eight, two, solved = (table.loc[name] for name in PLANS.split(","))
    assert table["change"].iloc[0] == 0
    assert table["kl"].iloc[0] < 1e-5 < eight["kl"] < solved["kl"] < two["kl"]
    assert table["bits"].tolist() == pytest.approx([32, 9, 3, 3])
    assert abs(eight["change"]) < 0.01
    for _, row in table.iterrows():
        assert row["low"] <= row["change"] <= row["high"]
        assert row["perplexity"] == pytest.approx((1 + row["change"]) * table["perplexity"].iloc[0])
    assert Perplexities.load(output) == found
    assert found.records[1]["definition"]["default"] == "fp32"


def test_further_plans_are_added_and_nothing_is_measured_again(measured, folder, datasets, monkeypatch):
    output, found = measured
    measure, names = PlanEvaluator._measure, []

    def spy(self, plan, *arguments):
        names.append(plan.name)
        return measure(self, plan, *arguments)

    monkeypatch.setattr(PlanEvaluator, "_measure", spy)
    more = compare_perplexity(folder, ["int8", *PLANS.split(",")], datasets=datasets, output=output)
    assert names == ["int8"]
    assert more.records[2:] == found.records[1:]
    with pytest.raises(LabError, match="dtype was fp32, now bf16"):
        compare_perplexity(folder, PLANS, datasets=datasets, output=output, dtype="bf16")


def test_other_seeds_calibrate_on_other_sequences(datasets, measured, folder, tmp_path):
    words = tiny_models.tokenizer()
    first, other, again = (replace(datasets, seed=seed).sequences(words, "calibration") for seed in (0, 1, 1))
    assert first.shape == other.shape
    assert not torch.equal(first, other)
    assert torch.equal(other, again)
    assert len({tuple(row.tolist()) for row in other}) == len(other)
    for purpose in ("probe", "validation"):
        assert torch.equal(
            replace(datasets, seed=1).sequences(words, purpose), datasets.sequences(words, purpose)
        )
    found = compare_perplexity(
        folder, PLANS.split(",")[1:], datasets=replace(datasets, seed=1), output=tmp_path, progress=False
    )
    rounded, solved = found.records[1:]
    assert rounded["losses"] == pytest.approx(measured[1].records[2]["losses"], rel=1e-6)
    assert solved["losses"] != pytest.approx(measured[1].records[3]["losses"], rel=1e-6)


def test_items_drawn_to_calibrate_are_never_those_that_compare_or_validate(monkeypatch):
    seeds = []
    monkeypatch.setattr(
        "labkit.loading.calibration.default_calibration", lambda *_, seed, **options: seeds.append(seed)
    )
    for seed in (0, 1, 2):
        Datasets(seed=seed).calibration_batches(None, ("image",), None)
    assert seeds == [None, DRAWN_FROM + 1, DRAWN_FROM + 2]
    assert max(PROBE_SEED, VALIDATION_SEED) <= DRAWN_FROM


def test_what_cannot_work_is_refused_before_anything_is_measured(folder, datasets, tmp_path):
    with pytest.raises(LabError, match=r"give a file of plain text \(--text\)"):
        compare_perplexity(folder, "int8", datasets=Datasets(), output=tmp_path / "a")
    with pytest.raises(PlanError, match=r"'int5' is no preset \(.*\), no plan file, and 'int5': unknown"):
        compare_perplexity(folder, "int8,int5", datasets=datasets, output=tmp_path / "a")
    with pytest.raises(LabError, match="dtype must be one of fp32, fp16, bf16"):
        compare_perplexity(folder, "int8", datasets=datasets, output=tmp_path / "a", dtype="int8")
    assert not (tmp_path / "a").exists()
    with pytest.raises(LabError, match="measure with `labkit perplexity` first"):
        Perplexities.load(tmp_path)
    (tmp_path / "perplexity.json").write_text('{"settings": {}}')
    with pytest.raises(LabError, match="is damaged"):
        Perplexities.load(tmp_path)


def test_shipped_perplexities_can_be_read_and_solving_beats_rounding():
    """Of a real language model, each plan calibrated on the same text."""
    found = Perplexities.load(ROOT / "assets" / "results" / "smollm2-perplexity")
    table = found.table()
    four = table.loc[["gptq", "awq", "hqq", "int4"], "perplexity"]
    assert list(four) == sorted(four)
    assert found.settings["material"]["seed"] == 0
    peers = Perplexities.load(ROOT / "assets" / "results" / "smollm2-perplexity" / "peers.json")
    assert peers.settings == found.settings
    theirs = {one["plan"]: one["perplexity"] for one in peers.records}
    scheme = theirs.pop("auto-round-50-autoscheme-5bit")
    assert table.loc["gptq", "perplexity"] < min(theirs.values())
    assert table.loc["awq", "perplexity"] < theirs["llm-compressor-awq"]
    assert table.loc["hqq", "perplexity"] < theirs["hqq"]
    assert table.loc["int4", "perplexity"] < 1.01 * theirs["llm-compressor-rtn-mse"]
    searched = table[table.index.str.startswith("searched")]
    assert len(searched) >= 2
    assert searched["bits"].max() <= 5.0
    assert searched["perplexity"].max() < 1.01 * scheme


def test_a_change_is_told_in_per_cent_and_of_a_broken_model_in_times():
    assert _change(-0.0051, -0.0102, 0.0049) == "−0.5% [−1.0%, +0.5%]"
    assert _change(26562.9, 20000.0, 30000.0) == "26,564 times"


def test_the_command_prints_and_writes(folder, datasets, tmp_path, capsys):
    words = ["perplexity", str(folder), "--text", datasets.text, "--plans", "int8", "--length", "64"]
    words += ["--calibration", "2", "--probe", "2", "--validation", "4", "--device", "cpu"]
    assert main([*words, "--output", str(tmp_path)]) == 0
    assert "command: perplexity" in (tmp_path / "config.yaml").read_text()
    told = capsys.readouterr().out
    assert "int8" in told
    assert "vs unquantized [95 %]" in told
    facts = json.loads((tmp_path / "perplexity.json").read_text())
    assert [one["plan"] for one in facts["records"]] == ["unquantized", "int8"]
    assert facts["settings"]["material"]["length"] == 64
    assert facts["environment"]["packages"]["torch"] == torch.__version__


def test_each_sequence_begins_with_what_the_tokenizer_puts_first(folder, datasets, tmp_path, capsys):
    words = tiny_models.tokenizer()
    names = ["<|user|>", "<|assistant|>"]
    first = words.convert_tokens_to_ids(names)
    words._tokenizer.post_processor = TemplateProcessing(
        single="<|user|> <|assistant|> $A <|endoftext|>",
        special_tokens=[*zip(names, first), ("<|endoftext|>", words.eos_token_id)],
    )
    plain = tiny_models.tokenizer()
    text = Path(datasets.text).read_text()
    for purpose in ("calibration", "probe", "validation"):
        sequences = datasets.sequences(words, purpose)
        assert sequences.shape[1] == datasets.length
        assert {tuple(row) for row in sequences[:, :2].tolist()} == {tuple(first)}
        assert plain.decode(sequences[:2, 2:].flatten()) in text
    assert "starts_with" not in datasets.settings(plain)
    model = tmp_path / "model"
    shutil.copytree(folder, model)
    words.save_pretrained(model)
    command = [
        "perplexity",
        str(model),
        "--text",
        datasets.text,
        "--plans",
        "int8",
        "--length",
        "64",
        "--probe",
        "1",
    ]
    command += [
        "--calibration",
        "1",
        "--validation",
        "2",
        "--device",
        "cpu",
        "--output",
        str(tmp_path / "out"),
    ]
    assert main(command) == 0
    assert "Each sequence begins with <|user|> <|assistant|>" in capsys.readouterr().out
    assert Perplexities.load(tmp_path / "out").settings["material"]["starts_with"] == " ".join(names)
    with pytest.raises(LabError, match=r"of 2 tokens has no room for text after <.user.> <.assist"):
        replace(datasets, length=2).sequences(words, "probe")


def test_the_perplexity_of_a_broken_model_is_infinite_and_its_change_is_still_measured(
    folder, datasets, tmp_path, capsys
):
    assert perplexity_of([800.0, 900.0]) == math.inf
    assert perplexity_of([2.0, 3.0]) == pytest.approx(math.exp(2.5))
    model = tiny_models.llama()
    model.lm_head.weight.data *= 1e5
    model.save_pretrained(tmp_path / "loud")
    tiny_models.tokenizer().save_pretrained(tmp_path / "loud")
    command = [
        "perplexity",
        str(tmp_path / "loud"),
        "--text",
        datasets.text,
        "--plans",
        "int8",
        "--length",
        "64",
    ]
    command += [
        "--calibration",
        "1",
        "--probe",
        "1",
        "--validation",
        "4",
        "--device",
        "cpu",
        "--output",
        str(tmp_path / "out"),
    ]
    assert main(command) == 0
    reference, row = Perplexities.load(tmp_path / "out").rows()
    assert reference["perplexity"] == row["perplexity"] == math.inf
    assert reference["change"] == 0
    assert "∞" in capsys.readouterr().out
