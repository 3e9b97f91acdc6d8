"""A transformers checkpoint, in a folder or on the hub: its configuration, skeleton, weights and processor.

Weights are read from safetensors only, and code from a model's repository is never run.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from labkit.common.errors import HubError, LabError, LoadError
from labkit.models.experts import unfuse_
from labkit.models.families import family_of
from labkit.models.hub import _first_line, _from_hub
from labkit.models.processors import AutoProcessorAdapter, TemplateProcessor
from labkit.models.spec import ModelSpec, list_models
from labkit.models.token_ids import IdProcessor
from labkit.models.weights import ShardedSource

logger = logging.getLogger(__name__)

COMPANIONS = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "LICENSE*", "NOTICE*")
"""Files of a checkpoint beside its weights: configuration, tokenizer, processor, licence."""
NO_COMPANIONS = ("*.index.json", "labkit*.json", "quantize_config.json")
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
            facts = self._read_json("config.json")
        except HubError as error:
            if spec.published is None:
                raise
            self._unreachable, facts = error, dict(spec.published)
        self.model_type = facts.get("model_type")
        if not isinstance(self.model_type, str):
            raise LoadError(f"the config.json of {spec.name} names no model_type")
        self.family = family_of(self.model_type)
        self.config, self.model_class = self._find_class(facts)

    def _read_json(self, name: str) -> dict[str, Any]:
        spec = self.spec
        path = spec.folder / name if spec.folder is not None else _from_hub(spec.source, name)
        try:
            facts = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            where = f"the folder {spec.folder}" if spec.folder else spec.source
            raise LoadError(f"{where} has no {name}") from None
        except (OSError, ValueError) as error:
            raise LoadError(f"{path} is broken: {error}") from None
        if not isinstance(facts, dict):
            raise LoadError(f"{path} is broken: expected an object")
        return facts

    def _find_class(self, facts: Mapping[str, Any]) -> tuple[Any, type]:
        import transformers

        if self.family.name == "pocket":
            from labkit.models.pocket import PocketConfig, PocketForConditionalGeneration

            return self._config(PocketConfig), PocketForConditionalGeneration
        if self._unreachable is not None:
            return transformers.AutoConfig.for_model(**facts), getattr(
                transformers, facts["architectures"][0]
            )
        if self.model_type == "qwen2_5_omni":  # the part that reads and writes; its talker only speaks
            config = self._config(transformers.AutoConfig).thinker_config
            return config, transformers.Qwen2_5OmniThinkerForConditionalGeneration
        if self.model_type not in transformers.CONFIG_MAPPING:
            code = " (it brings its own code, which is not run here)" if "auto_map" in facts else ""
            raise LoadError(
                f"transformers {transformers.__version__} has no architecture {self.model_type!r}{code}"
            )
        config = self._config(transformers.AutoConfig)
        for name in facts.get("architectures") or []:
            model_class = getattr(transformers, name, None)
            if model_class is not None and hasattr(model_class, "generate"):
                return config, model_class
        mapping = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
        if type(config) in mapping:
            return config, mapping[type(config)]
        raise LoadError(f"{self.spec.name} ({self.model_type}) is not a model that generates text")

    def _config(self, config_class: Any) -> Any:
        try:
            return config_class.from_pretrained(self.source)
        except Exception as error:
            raise LoadError(
                f"the config.json of {self.spec.name} is not valid: {_first_line(error)}"
            ) from None

    def check_weights(self) -> None:
        """Check a local folder's safetensors headers: every shard exists and none is truncated.

        Raises:
            LoadError: a shard is missing or damaged (the message names it), or the hub cannot be reached.
        """
        if self._unreachable is not None:
            raise self._unreachable
        folder = self.spec.folder
        if folder is None:
            return
        names = self._weight_names()
        for name in names:
            path = folder / name
            if not path.is_file():
                others = sorted(file.name for file in folder.glob("*.bin"))
                hint = f" ({others[0]} is a pickle, which is never loaded: convert it)" if others else ""
                raise LoadError(f"{folder} has no {name}{hint}: weights are read from safetensors only")
            from safetensors import SafetensorError, safe_open

            try:
                with safe_open(path, framework="pt"):
                    pass
            except (SafetensorError, OSError) as error:
                raise LoadError(f"{path} is broken or cut off: {_first_line(error)}") from None

    def _weight_names(self) -> list[str]:
        """Names of the files that hold the weights, from the index if there is one."""
        index = "model.safetensors.index.json"
        try:
            return sorted(set(self._read_json(index).get("weight_map", {}).values()))
        except LoadError:
            if self.spec.folder is not None and (self.spec.folder / index).is_file():
                raise
            return ["model.safetensors"]  # a single file

    def tensors(self, skeleton: torch.nn.Module) -> ShardedSource:
        """The weights, tensor by tensor; a hub model's weights are downloaded first unless they are cached.

        Raises:
            LoadError: weights are missing from the files, or their shapes differ from the configuration's.
        """
        if self._unreachable is not None:
            raise self._unreachable
        folder = self.spec.folder
        files = [
            folder / name if folder else _from_hub(self.spec.source, name) for name in self._weight_names()
        ]
        return ShardedSource(skeleton, files, self.spec.name)

    def stored_bytes(self, skeleton: torch.nn.Module) -> int:
        """Bytes of the weights as stored: from the files, or on the hub from the configuration's dtype."""
        if self.spec.folder is not None:
            return sum(path.stat().st_size for path in self.spec.folder.glob("*.safetensors"))
        itemsize = getattr(self.config.dtype, "itemsize", 2)
        return sum(parameter.numel() for parameter in skeleton.parameters()) * itemsize

    def skeleton(self) -> torch.nn.Module:
        """The model without weights, on the meta device: names, shapes and ties only; experts as Linears."""
        with quiet_transformers(), torch.device("meta"):
            model = self.model_class(self.config)
        model.tie_weights()
        _leave_values_(model)
        unfuse_(model)
        return model.eval()

    def weights(self, device: torch.device, progress: bool = True) -> torch.nn.Module:
        """The model with its weights, in the dtype they are stored in.

        Raises:
            LoadError: weights are missing from the files, or their shapes differ from the configuration's.
        """
        with quiet_transformers(progress):
            try:
                model, report = self.model_class.from_pretrained(
                    self.source,
                    config=self.config,
                    dtype="auto",
                    use_safetensors=True,
                    device_map={"": device} if device.type == "cuda" else None,
                    output_loading_info=True,
                )
            except (OSError, RuntimeError, ValueError) as error:
                raise LoadError(
                    f"the weights of {self.spec.name} cannot be loaded: {_first_line(error)}"
                ) from error
        if missing := sorted(report["missing_keys"]):
            raise LoadError(
                f"the weights of {self.spec.name} lack {len(missing)} tensors of its configuration: "
                + ", ".join(missing[:5])
            )
        if unexpected := report["unexpected_keys"]:
            logger.warning("%s: %d tensors were not used", self.spec.name, len(unexpected))
        unfuse_(model)
        for parameter in model.parameters():
            if parameter.is_cpu and parameter.data_ptr() % ALIGNMENT:  # it lies in the file's memory map
                parameter.data = parameter.data.clone()
        return model.eval()

    def processor(self, dtype: torch.dtype = torch.float32) -> Any:
        """The processor, built without torchvision (see :mod:`labkit.models.processors`)."""
        try:
            with quiet_transformers():
                return self._processor(dtype)
        except LabError:
            raise
        except Exception as error:
            raise LoadError(
                f"the processor of {self.spec.name} cannot be built: {_first_line(error)}"
            ) from error

    def processor_or_ids(self, dtype: torch.dtype = torch.float32) -> Any:
        """The processor; where none is available, one whose prompts are token ids."""
        if self._unreachable is None:
            try:
                return self.processor(dtype)
            except LoadError as error:
                logger.warning("prompts of %s are token ids: %s", self.spec.name, error)
        return IdProcessor(self.config)

    def companions(self) -> list[Path]:
        """Configuration, tokenizer, processor and licence files: in the folder, or in the hub's cache."""
        folder = self.spec.folder or _from_hub(self.spec.source, "config.json").parent
        files = {path for pattern in COMPANIONS for path in folder.glob(pattern) if path.is_file()}
        return sorted(path for path in files if not any(path.match(pattern) for pattern in NO_COMPANIONS))

    def add_generation_config(self, model: torch.nn.Module) -> None:
        """Set the generation config of a model whose weights the lab loaded; transformers' own loading does so."""
        from transformers import GenerationConfig

        if self._unreachable is not None:
            return
        try:
            facts = self._read_json("generation_config.json")
        except LoadError:
            return  # it has none
        model.generation_config = GenerationConfig.from_dict(facts)

    def facts(self) -> dict[str, Any]:
        """What identifies this model in a record: ``name, source, on_hub, commit, fingerprint, model_type``."""
        spec = self.spec
        registered = any(listed.source == spec.source for listed in list_models())
        on_hub = spec.folder is None
        snapshot = _from_hub(spec.source, "config.json").parent.name if on_hub else None
        return {
            "name": spec.name,
            "source": spec.name if registered and not on_hub else spec.source,
            "on_hub": on_hub,
            "commit": snapshot,
            "fingerprint": folder_fingerprint(spec.folder) if spec.folder else None,
            "model_type": self.model_type,
        }

    def _processor(self, dtype: torch.dtype) -> Any:
        from transformers import AutoProcessor, AutoTokenizer

        if self.family.name == "pocket":
            from labkit.models.pocket import PocketProcessor

            return PocketProcessor.from_pretrained(self.source)
        tokenizer = AutoTokenizer.from_pretrained(self.source)
        if self.family.name == "Glm4v":
            from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil

            pixels = Glm4vImageProcessorPil.from_pretrained(self.source)
            token = tokenizer.convert_ids_to_tokens(self.config.image_token_id)
            return TemplateProcessor(tokenizer, pixels, token)
        if not self.family.modalities:
            return TemplateProcessor(tokenizer)
        try:
            return AutoProcessorAdapter(
                AutoProcessor.from_pretrained(self.source), self.family.modalities, dtype
            )
        except (ImportError, OSError, ValueError) as error:
            reason = f"its processor cannot be built here ({_first_line(error)})"
            logger.warning("%s takes text only: %s", self.spec.name, reason)
            return TemplateProcessor(tokenizer, missing=dict.fromkeys(self.family.modalities, reason))


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
