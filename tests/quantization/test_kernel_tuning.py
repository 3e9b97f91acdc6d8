"""Which tiles a product gets: measured ones, if there are any for its format, shape and rows, else sensible ones."""

import pytest
import torch

from labkit.quantization.kernels import cuda_products as cuda
from labkit.quantization.kernels import cuda_tuning
from labkit.quantization.kernels.cuda_products import Packed, Tiles

DEVICE = torch.device("meta")


def packed(kind: str, out_features: int, in_features: int) -> Packed:
    if kind == "bf16":
        return Packed(torch.empty(out_features, in_features, dtype=torch.bfloat16, device=DEVICE))
    if kind == "int8":
        scale = torch.empty(out_features, dtype=torch.bfloat16, device=DEVICE)
        return Packed(torch.empty(out_features, in_features, dtype=torch.int8, device=DEVICE), scale)
    pairs = torch.empty(in_features // 64, out_features, 2, dtype=torch.bfloat16, device=DEVICE)
    return Packed(torch.empty(out_features, in_features // 2, dtype=torch.uint8, device=DEVICE), pairs, 64)


SHAPES = [("int4", 4608, 4096), ("int4", 4096, 13696), ("int8", 151552, 4096), ("bf16", 384, 1024)]


@pytest.fixture
def device(monkeypatch, tmp_path):
    """A GPU of 132 multiprocessors that nobody has measured anything on."""
    monkeypatch.setattr(cuda_tuning, "_processors", lambda _: 132)
    monkeypatch.setattr(cuda_tuning, "_path", lambda _: tmp_path / "tiles.json")
    monkeypatch.setattr(cuda, "available", lambda _: True)
    cuda_tuning._known.cache_clear()
    yield
    cuda_tuning._known.cache_clear()


def test_formats_and_bytes():
    assert [packed(*one).format for one in SHAPES] == ["int4-g64", "int4-g64", "int8", "bf16"]
    assert packed("int4", 128, 256).nbytes == 128 * 128 + 4 * 128 * 2 * 2
    assert packed("int4", 128, 256).in_features == 256
    assert packed("int4", 4096, 13696).steps == (64, 32)  # 6848 columns of bytes are no multiple of 128
    assert packed("int8", 8, 13696).steps == (128, 64, 32)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("gated", [False, True])
def test_candidates_can_run(shape, gated):
    one = packed(*shape)
    for tiles in [*cuda_tuning.candidates(one, 8, gated), cuda_tuning.default_tiles(one, gated)]:
        assert tiles.bk in one.steps
        assert tiles.splits in cuda_tuning.SPLITS
        assert tiles.splits > 1 or not gated or tiles.bn <= 64
    assert len(cuda_tuning.candidates(one, 8, gated)) > 3


@pytest.mark.usefixtures("device")
def test_small_weights_are_split_until_they_fill_the_gpu():
    assert cuda_tuning.default_tiles(packed("int4", 4096, 4096)).splits == 8
    assert cuda_tuning.default_tiles(packed("int8", 151552, 4096)).splits == 1
    assert cuda_tuning.default_tiles(packed("int4", 4096, 4096), gated=True).splits == 1


@pytest.mark.usefixtures("device")
def test_what_was_measured_is_kept_and_used(tmp_path):
    one = packed("int4", 4096, 4096)
    assert cuda_tuning.tiles_for(one, 3) == cuda_tuning.default_tiles(one)
    best = Tiles(32, 64, 4, 8, 5)
    cuda_tuning.keep(
        DEVICE, cuda_tuning._key(one, 8, False), {"bn": 32, "bk": 64, "splits": 4, "warps": 8, "stages": 5}
    )
    cuda_tuning.keep(DEVICE, cuda_tuning._key(one, 16, False), cuda_tuning.DEQUANTIZE)
    cuda_tuning._known.cache_clear()  # as in the next process
    assert (tmp_path / "tiles.json").exists()
    assert cuda_tuning.tiles_for(one, 1) == best
    assert cuda_tuning.tiles_for(one, 8) == best
    assert cuda_tuning.tiles_for(one, 9) is None  # dequantize and multiply
    assert cuda_tuning.tiles_for(one, 17) == cuda_tuning.default_tiles(one)
    assert cuda_tuning.tiles_for(one, cuda.MOST_ROWS + 1) is None
    assert cuda_tuning.tiles_for(packed("int4", 4096, 8192), 8) == cuda_tuning.default_tiles(
        packed("int4", 4096, 8192)
    )


@pytest.mark.usefixtures("device")
def test_a_damaged_file_is_as_good_as_none(tmp_path):
    (tmp_path / "tiles.json").write_text("{")
    one = packed("int8", 4096, 4096)
    assert cuda_tuning.tiles_for(one, 1) == cuda_tuning.default_tiles(one)


def test_the_folder_can_be_chosen(monkeypatch, tmp_path):
    monkeypatch.setenv("LABKIT_CACHE", str(tmp_path))
    assert cuda_tuning.cache_folder() == tmp_path
    monkeypatch.delenv("LABKIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert cuda_tuning.cache_folder() == tmp_path / "cache" / "labkit"


@pytest.mark.usefixtures("device")
def test_without_triton_nothing_is_a_matter_of_tiles(monkeypatch):
    monkeypatch.setattr(cuda, "available", lambda _: False)
    assert cuda_tuning.tiles_for(packed("int8", 4096, 4096), 1) is None
