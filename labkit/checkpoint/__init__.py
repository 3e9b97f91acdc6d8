"""Quantized checkpoints: a folder from which a quantized model is restored bit for bit.

| file | what |
|---|---|
| `manifest.py` | ``labkit.json``: model, plan, scheme of each module, calibration, hashes of the files |
| `tensors.py` | a model's tensors, packed as they are, in safetensors files and back |
| `save.py` | an engine's model into a folder, whole or not at all |
| `restore.py` | the folder's model, without the original weights and without calibration |
| `steps.py` | finished modules of a quantization under way: what an interrupted run continues from |
| `fingerprint.py` | what a calibration was |
| `card.py` | the folder's ``README.md`` |
"""

from labkit.checkpoint.manifest import Manifest
from labkit.common.errors import CheckpointError

__all__ = ["CheckpointError", "Manifest"]
