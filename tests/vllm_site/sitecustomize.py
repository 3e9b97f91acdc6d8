"""Read by Python at its start in the environment of `make test-vllm`.

PyPI's torchvision is built for CUDA. Beside a CPU torch its operators are missing, and importing it fails because
two of them are not declared; its functions on images, which vLLM's Glm4v uses, need none. So they are declared
before it is imported, unless its library can be loaded.
"""

import importlib.abc
import sys


class DeclareOperators(importlib.abc.MetaPathFinder):
    """Finds nothing: it only comes before torchvision."""

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            if torch.version.cuda is None:
                self.library = torch.library.Library("torchvision", "FRAGMENT")
                for operator in ("nms", "qnms"):
                    self.library.define(
                        f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                    )
                sys.modules["labkit_torchvision_operators"] = self.library
        return None


sys.meta_path.insert(0, DeclareOperators())
