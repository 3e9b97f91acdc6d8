"""What all tests share: GPU tests are skipped without a GPU, and slow ones start first."""

import pytest


def pytest_collection_modifyitems(items):
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if gpu:
        import torch

        if not torch.cuda.is_available():
            for item in gpu:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
