"""A transformers checkpoint, in a folder or on the hub: its configuration, skeleton, weights and processor.

Weights are read from safetensors only, and code from a model's repository is never run.
"""

from __future__ import annotations

import hashlib
import logging
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from labkit.common.errors import HubError, LabError, LoadError
from labkit.models.architecture import architecture_of, published_architecture
from labkit.models.experts import unfuse_
from labkit.models.families import family_of
from labkit.models.hub import _first_line, model_file, read_json
from labkit.models.processors import Processor, processor_of
from labkit.models.source_formats import CONFIG_FILES, SourceFormat, source_format
from labkit.models.spec import ModelSpec, list_models
from labkit.models.stored import StoredTensor, stored_tensors
from labkit.models.token_ids import IdProcessor
from labkit.models.weight_files import WeightFiles, weight_files
from labkit.models.weights import ShardedSource, check_unused, copies_of_ties

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

COMPANIONS = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "LICENSE*", "NOTICE*")
"""Files of a checkpoint beside its weights: configuration, tokenizer, processor, licence."""
NO_COMPANIONS = ("*.index.json", "labkit*.json", *CONFIG_FILES)
ALIGNMENT = 64
"""Bytes that torch aligns its own tensors at: sums of a product can depend on it."""
HASHED_BYTES = 1_000_000_000
"""The fingerprint covers the content of checkpoints up to this size, and file sizes and times above it."""


class Checkpoint:
    """A transformers checkpoint, in a folder or on the hub: its configuration, processor and weights.

    Where the hub cannot be reached, the skeleton is built from the spec's published configuration; weights and
    processor then raise.

    Args:
        spec: which model.
        ask_hub: False uses only the folder, the hub's local cache and the published configuration.

    Raises:
        LoadError: there is no readable configuration, or transformers lacks the architecture.
    """

    def __init__(self, spec: ModelSpec, ask_hub: bool = True):
        self.spec = spec
        self.source = str(spec.folder or spec.source)
        self._unreachable: LoadError | None = None
        try:
            if not ask_hub and spec.folder is None and spec.availability() != "downloaded":
                raise HubError(f"{spec.source} is not in the local cache, and the hub is not asked")
            facts = read_json(self.spec, "config.json")
        except HubError as error:
            if spec.published is None:
                raise
            self._unreachable, facts = error, dict(spec.published)
        self._facts = facts
        self.model_type = facts.get("model_type")
        if not isinstance(self.model_type, str):
            raise LoadError(f"the config.json of {spec.name} names no model_type")
        self.family = family_of(self.model_type)
        if self._unreachable is None:
            self.config, self.model_class = architecture_of(self.source, spec.name, facts, self.family)
        else:
            self.config, self.model_class = published_architecture(facts)

    def check_weights(self) -> None:
        """Check a local folder's safetensors headers, and that the lab reads the format of its weights.

        Raises:
            LoadError: a file is missing, damaged or contradicts the index; weights are quantized in a format that
                the lab does not read; or the hub cannot be reached.
        """
        if self._unreachable is not None:
            raise self._unreachable
        checked = [self._generation_config, self.source_format]
        if self.spec.folder is not None:
            checked.append(self._files)

    @cached_property
    def source_format(self) -> SourceFormat | None:
        """The format in which others quantized these weights, which are dequantized as they are read; else None.

        Raises:
            LoadError: the lab does not read the format.
        """
        return source_format(self._facts, self.spec.folder, self.spec.name)

    @cached_property
    def _files(self) -> WeightFiles:
        return weight_files(self.spec)

    def _stored(self) -> dict[str, StoredTensor]:
        """The tensors by the names of an unquantized model; hub files are downloaded unless they are cached."""
        if self._unreachable is not None:
            raise self._unreachable
        if self.source_format is not None:
            logger.warning(
                "%s is quantized already, by %s: its weights are dequantized as they are read, its activations and "
                "KV cache are the plan's",
                self.spec.name,
                self.source_format.name,
            )
        return stored_tensors(self._files, self.source_format, self.spec.name)

    def tensors(self, skeleton: torch.nn.Module) -> ShardedSource:
        """The weights, tensor by tensor; a hub model's weights are downloaded first unless they are cached.

        Raises:
            LoadError: weights are missing from the files, or their shapes differ from the configuration's.
        """
        stored = self._stored()
        return ShardedSource(skeleton, stored, self.spec.name, self._files.unlisted)

    def stored_bytes(self, skeleton: torch.nn.Module) -> int:
        """Bytes of the weights when read whole: from the files, or on the hub from the configuration's dtype."""
        if self.spec.folder is not None and self.source_format is None:
            return sum(path.stat().st_size for path in self.spec.folder.glob("*.safetensors"))
        itemsize = getattr(self.config.dtype, "itemsize", 2)
        return sum(parameter.numel() for parameter in skeleton.parameters()) * itemsize

    def skeleton(self) -> torch.nn.Module:
        """The model without weights, on the meta device: names, shapes and ties only; experts as Linears.

        Raises:
            LoadError: no model can be built of the configuration.
        """
        try:
            with quiet_transformers(), torch.device("meta"):
                model = self.model_class(self.config)
            model.tie_weights()
            _leave_values_(model)
            unfuse_(model)
        except Exception as error:
            raise LoadError(
                f"no model can be built of the config.json of {self.spec.name}: {_first_line(error)}"
            ) from error
        return model.eval()

    def weights(self, device: torch.device, progress: bool = True) -> torch.nn.Module:
        """The model with its weights, in the dtype they are stored in.

        Raises:
            LoadError: weights are missing from the files, or their shapes differ from the configuration's.
        """
        stored, name = self._stored(), self.spec.name
        skeleton = self.skeleton()
        copies_of_ties(skeleton, stored, name)
        plain = (tensor.read().dtype for tensor in stored.values() if tensor.layout is None)
        dtype = self.config.dtype or next(
            (dtype for dtype in plain if dtype.is_floating_point), torch.float32
        )
        with quiet_transformers(progress):
            try:
                model, report = self.model_class.from_pretrained(
                    None,
                    config=self.config,
                    state_dict=stored,
                    dtype=dtype,
                    device_map={"": device} if device.type == "cuda" else None,
                    output_loading_info=True,
                )
            except (OSError, RuntimeError, ValueError) as error:
                raise LoadError(f"the weights of {name} cannot be loaded: {_first_line(error)}") from error
        if missing := sorted(report["missing_keys"]):
            raise LoadError(
                f"the weights of {name} lack {len(missing)} tensors of its configuration: "
                + ", ".join(missing[:5])
            )
        if unused := [*self._files.unlisted, *report["unexpected_keys"]]:
            check_unused(skeleton, unused, {*stored, *skeleton.state_dict()} - set(unused), name)
            logger.warning("%s: %d tensors were not used, such as %s", name, len(unused), unused[0])
        self.add_generation_config(model)
        unfuse_(model)
        for parameter in model.parameters():
            if parameter.is_cpu and parameter.data_ptr() % ALIGNMENT:  # it lies in the file's memory map
                parameter.data = parameter.data.clone()
        return model.eval()

    def processor(self, dtype: torch.dtype = torch.float32) -> Processor:
        """The processor, built without torchvision (see :mod:`labkit.models.processors`).

        Raises:
            LoadError: it cannot be built, or its tokenizer is of another model.
        """
        try:
            with quiet_transformers():
                processor = processor_of(self.source, self.spec.name, self.config, self.family, dtype)
            self._check_vocabulary(processor.tokenizer)
            return processor
        except LabError:
            raise
        except Exception as error:
            raise LoadError(
                f"the processor of {self.spec.name} cannot be built: {_first_line(error)}"
            ) from error

    def _check_vocabulary(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuse a tokenizer that writes more tokens than the model has rows; added ones may never be used."""
        name, rows = self.spec.name, self.config.get_text_config(decoder=True).vocab_size
        if tokenizer.vocab_size > rows:
            raise LoadError(
                f"the tokenizer of {name} has {tokenizer.vocab_size} tokens, the model {rows}: it is another model's"
            )
        if len(tokenizer) > rows:
            logger.warning(
                "%s has no rows for %d tokens of its tokenizer: prompts with them are refused",
                name,
                len(tokenizer) - rows,
            )

    def processor_or_ids(self, dtype: torch.dtype = torch.float32) -> Processor:
        """The processor; where none is available, one whose prompts are token ids."""
        if self._unreachable is None:
            try:
                return self.processor(dtype)
            except LoadError as error:
                logger.warning("prompts of %s are token ids: %s", self.spec.name, error)
        return IdProcessor(self.config)

    def companions(self) -> list[Path]:
        """Configuration, tokenizer, processor and licence files: in the folder, or in the hub's cache."""
        folder = model_file(self.spec, "config.json").parent
        files = {path for pattern in COMPANIONS for path in folder.glob(pattern) if path.is_file()}
        return sorted(path for path in files if not any(path.match(pattern) for pattern in NO_COMPANIONS))

    def add_generation_config(self, model: torch.nn.Module) -> None:
        """Set the generation config of a model whose weights the lab loaded."""
        if self._generation_config is not None:
            model.generation_config = self._generation_config

    @cached_property
    def _generation_config(self) -> GenerationConfig | None:
        """The generation config; None for a model without one.

        Raises:
            LoadError: it is malformed.
        """
        from transformers import GenerationConfig

        name, folder = "generation_config.json", self.spec.folder
        if self._unreachable is not None or (folder is not None and not (folder / name).is_file()):
            return None
        try:
            facts = read_json(self.spec, name)
        except HubError:
            return None
        try:
            return GenerationConfig.from_dict(facts)
        except Exception as error:
            raise LoadError(f"the {name} of {self.spec.name} is not valid: {_first_line(error)}") from None

    def facts(self) -> dict[str, Any]:
        """What identifies this model in a record: ``name, source, on_hub, commit, fingerprint, model_type``."""
        spec = self.spec
        registered = any(listed.source == spec.source for listed in list_models())
        on_hub = spec.folder is None
        snapshot = model_file(spec, "config.json").parent.name if on_hub else None
        return {
            "name": spec.name,
            "source": spec.name if registered and not on_hub else spec.source,
            "on_hub": on_hub,
            "commit": snapshot,
            "fingerprint": folder_fingerprint(spec.folder) if spec.folder else None,
            "model_type": self.model_type,
        }


def _leave_values_(model: torch.nn.Module) -> None:
    """Move what a checkpoint stores to the meta device: some families draw parameters on the CPU whatever the
    device, and these would pass for loaded ones."""
    moved: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None or tensor.is_meta or name in module._non_persistent_buffers_set:
                    continue
                bare = torch.empty_like(tensor, device="meta")
                if isinstance(tensor, torch.nn.Parameter):
                    bare = torch.nn.Parameter(bare, requires_grad=False)
                tensors[name] = moved.setdefault(id(tensor), bare)


def folder_fingerprint(folder: Path) -> str:
    """Hash of a checkpoint folder's configuration and weights, or of sizes and times if it is large."""
    files = sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors"))
    digest = hashlib.sha256()
    if sum(path.stat().st_size for path in files) > HASHED_BYTES:
        digest.update(repr([(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files]).encode())
        return digest.hexdigest()
    for path in files:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


@contextmanager
def quiet_transformers(progress: bool = False):
    """Silence transformers' warnings, and its progress bars unless they are enabled."""
    from transformers.utils import logging as transformers_logging

    level = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    if not progress:
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
