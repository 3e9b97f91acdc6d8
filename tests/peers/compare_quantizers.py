"""Other libraries' weights beside the lab's: same model, bits, groups and calibration, judged by the same text.

    python tests/peers/compare_quantizers.py text smollm2 smollm2-text.txt peers       in the lab's environment
    python tests/peers/compare_quantizers.py quantize smollm2 peers llm-compressor     in one that has the library
    python tests/peers/compare_quantizers.py measure smollm2 smollm2-text.txt peers    in the lab's environment

`tests/peers/make_smollm2.py smollm2` makes the model and the text. ``text`` writes the token ids that calibrate in the lab;
``quantize`` gives them to a library and keeps the codes and scales that it finds, and what else it changed, as norms;
``measure`` lays what those mean into the unquantized model, and measures it as `labkit perplexity` does, beside the figures
in --beside. So no library's own kernels or file format take part; weights that are on no grid of codes are refused, and so
are unchanged ones.

Each library wants an environment of its own (``pip install llmcompressor``, ``gptqmodel``, ``auto-round`` or ``hqq``); a CPU
is enough.
"""

from __future__ import annotations

import json
import time
from argparse import ArgumentParser, Namespace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from other_quantizers import LIBRARIES, SCALE_BITS, linears_of, others_of, read_model
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
BESIDE = ROOT / "assets/results/smollm2-perplexity"
CALIBRATION, FACTS, TENSORS = "calibration.json", "peer.json", "weights.safetensors"
OFF_GRID = 0.02
"""How far from a code a weight may be, in steps: more is no rounding of a float."""


def steps_of(name: str, weight: Tensor, scale: Tensor, bits: int, original: Tensor) -> dict[str, Tensor]:
    """A weight [N, K] as codes uint8 [N, K] from 0, scale and the value of code 0 [N, K/G]; stops if it is none of that."""
    scale = scale.detach().float().abs()
    groups = weight.detach().float().unflatten(1, (scale.shape[1], -1))
    low = groups.amin(-1)
    codes = (groups - low[..., None]) / scale.clamp(min=1e-12)[..., None]
    whole = codes.round()
    if (codes - whole).abs().max() > OFF_GRID or whole.max() >= 2**bits:
        raise SystemExit(f"{name}: the weight is not {bits} bits: it spans {whole.max():g} steps")
    if torch.equal(weight.float(), original.float()):
        raise SystemExit(f"{name}: the weight is as it was")
    return {"codes": whole.flatten(1).to(torch.uint8), "scale": scale, "low": low}


def weight_of(codes: Tensor, scale: Tensor, low: Tensor) -> Tensor:
    """The weight [N, K] that `steps_of` took apart."""
    groups = codes.float().unflatten(1, (scale.shape[1], -1))
    return (groups * scale[..., None] + low[..., None]).flatten(1)


def quantize(options: Namespace) -> None:
    """Let a library quantize the model, and keep what it finds."""
    from safetensors.torch import save_file

    package, run, heeded = LIBRARIES[options.library]
    ids = json.loads((options.peers / CALIBRATION).read_text(encoding="utf-8"))
    unquantized = read_model(options.model)
    originals, others = linears_of(unquantized), others_of(unquantized)
    began = time.perf_counter()
    tensors, layers = {}, {}
    for name, weight, *grid in run(options, ids):
        if not grid:
            if not torch.equal(weight, others[name]):
                tensors[name] = weight.contiguous()
            continue
        scale, bits, zero_bits = grid
        original = originals[name].weight.detach()
        for key, value in steps_of(name, weight, scale, bits, original).items():
            tensors[f"{name}.{key}"] = value.contiguous()
        stored = bits * original.numel() + (SCALE_BITS + zero_bits) * scale.numel()
        layers[name] = {"bits": bits, "stored_bits": stored, "values": original.numel()}
    if missing := originals.keys() - layers.keys():
        raise SystemExit(f"not quantized: {', '.join(sorted(missing))}")
    facts = {
        "plan": options.name or options.library,
        "library": package,
        "version": version(package),
        "torch": version("torch"),
        "options": {name: getattr(options, name) for name in heeded},
        "bits": sum(one["stored_bits"] for one in layers.values())
        / sum(one["values"] for one in layers.values()),
        "layers": {name: one["bits"] for name, one in layers.items()},
        "seconds": round(time.perf_counter() - began, 1),
    }
    folder = options.peers / facts["plan"]
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / TENSORS)
    (folder / FACTS).write_text(json.dumps(facts, indent=1), encoding="utf-8")
    print(facts["plan"], f"{facts['bits']:.4f} bits a value", f"{facts['seconds']} s")


def datasets_of(settings: dict[str, Any], text: Path) -> Any:
    """The amounts in the settings of `labkit perplexity`, of the text, which must be the same."""
    from labkit.loading.datasets import Datasets

    amounts = {name: value for name, value in settings["material"].items() if name != "text"}
    datasets = Datasets(text=str(text), **amounts)
    if datasets.settings() != settings["material"]:
        raise SystemExit(f"{text} is not the text that the figures to set beside are of")
    return datasets


def write_text(options: Namespace) -> None:
    """Write the token ids that calibrate the lab's own plans."""
    from transformers import AutoTokenizer

    from labkit.measure.perplexity import Perplexities

    datasets = datasets_of(Perplexities.load(options.beside).settings, options.text)
    ids = datasets.sequences(AutoTokenizer.from_pretrained(options.model), "calibration")
    options.peers.mkdir(parents=True, exist_ok=True)
    (options.peers / CALIBRATION).write_text(json.dumps(ids.tolist()), encoding="utf-8")
    print(options.peers / CALIBRATION, tuple(ids.shape))


@torch.no_grad()
def measure(options: Namespace) -> None:
    """Measure every result below the folder, as far as it is not in the file yet."""
    from safetensors.torch import load_file

    from labkit.loading.load import load
    from labkit.measure.perplexity import Perplexities
    from labkit.measure.probe import divergence, perplexity_of, probe_of, sequence_losses

    beside = Perplexities.load(options.beside)
    file = options.output or options.beside / "peers.json"
    datasets = datasets_of(beside.settings, options.text)
    engine = load(str(options.model), beside.settings["dtype"], "cpu", progress=False)
    sequences = datasets.sequences(engine.tokenizer, "validation")
    probe = probe_of(engine, datasets)
    linears, others = linears_of(engine.model), others_of(engine.model)
    originals = {name: one.clone() for name, one in others.items()}
    whole = beside.records[0]["bytes"] - sum(4 * one.weight.numel() for one in linears.values())
    found = json.loads(file.read_text(encoding="utf-8"))["records"] if file.is_file() else []
    records = {one["plan"]: one for one in found}
    for path in sorted(options.peers.glob(f"*/{FACTS}")):
        facts = json.loads(path.read_text(encoding="utf-8"))
        if facts.items() <= records.get(facts["plan"], {}).items():
            continue
        tensors = load_file(path.with_name(TENSORS))
        for name, linear in linears.items():
            linear.weight.copy_(weight_of(*(tensors[f"{name}.{key}"] for key in ("codes", "scale", "low"))))
        for name, other in others.items():
            other.copy_(tensors.get(name, originals[name]))
        losses, apart = sequence_losses(engine.model, sequences), divergence(engine.model, probe)
        size = whole + round(facts["bits"] * sum(one.weight.numel() for one in linears.values()) / 8)
        records[facts["plan"]] = {
            **facts,
            "bytes": size,
            "kl": apart.kl,
            "agreement": apart.agreement,
            "perplexity": perplexity_of(losses),
            "losses": losses,
        }
        _keep(file, beside.settings, records)
    _keep(file, beside.settings, records)
    for row in Perplexities({}, [*beside.records, *records.values()]).rows():
        print(f"{row['plan']:32} {row['bits']:7.4f} bits  {row['perplexity']:12.3f}  {row['change']:+.2%}")


def _keep(file: Path, settings: dict[str, Any], records: dict[str, dict[str, Any]]) -> None:
    from labkit.common.machine import environment
    from labkit.measure.perplexity import Perplexities

    Perplexities(settings, list(records.values()), environment=environment()).save(file)


def main() -> None:
    """See the module's text."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    steps = parser.add_subparsers(dest="step", required=True)
    for step, do in (("text", write_text), ("quantize", quantize), ("measure", measure)):
        command = steps.add_parser(step, help=do.__doc__.splitlines()[0])
        command.set_defaults(do=do)
        command.add_argument("model", type=Path, help="the unquantized model's folder")
        if step != "quantize":
            command.add_argument("text", type=Path)
            command.add_argument(
                "--beside", type=Path, default=BESIDE, help="where `labkit perplexity` wrote"
            )
        command.add_argument("peers", type=Path, help="the folder for what the libraries find")
    command.add_argument("--output", type=Path, help="the file to add to (peers.json in --beside)")
    command = steps.choices["quantize"]
    command.add_argument("library", choices=LIBRARIES)
    command.add_argument("--name", help="of the result (the library's)")
    command.add_argument("--bits", type=int, default=4)
    command.add_argument("--group-size", type=int, default=64)
    command.add_argument("--symmetric", action="store_true")
    command.add_argument("--observer", help="how llm-compressor finds ranges, as mse (its default)")
    command.add_argument(
        "--act-order", action="store_true", help="gptqmodel: columns by falling activation, static groups"
    )
    command.add_argument("--iters", type=int, default=200, help="auto-round: steps of tuning (200)")
    command.add_argument("--average", type=float, help="auto-round: bits on average, by AutoScheme")
    command.add_argument("--scored", type=int, default=16, help="AutoScheme: sequences that score (16)")
    command.add_argument("--like", metavar="NAME", help="auto-round: each layer's bits as there")
    options = parser.parse_args()
    options.do(options)


if __name__ == "__main__":
    main()
