"""Reads YAML as it is meant here: no key twice, dates as text, no alias inside its own anchor."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import yaml

from labkit.common.errors import LabError
from labkit.common.files import user_path


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, stricter where it would take a slip silently."""

    # A date in a plan is a name or a version: as text, 2026-13-45 is as good as any.
    yaml_implicit_resolvers: ClassVar = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    # What JSON has no word for could not be recorded beside a measurement.
    yaml_constructors: ClassVar = {
        tag: construct
        for tag, construct in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or not tag.endswith((":set", ":omap", ":pairs", ":binary", ":timestamp"))
    }

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        node = super().compose_node(parent, index)
        if node is not None and node.end_mark is None:  # an alias to what is still being read
            raise yaml.composer.ComposerError(
                None, None, "an alias stands inside its own anchor", self.peek_event().start_mark
            )
        return node

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        # Checked before merge keys (<<) are resolved: a key beside one replaces the merged key.
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    None,
                    None,
                    "a key must be text, not a list or a mapping (an unfilled {{ template }}?)",
                    key.start_mark,
                )
            if (key.tag, key.value) in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} is given twice", key.start_mark
                )
            seen.add((key.tag, key.value))
        return node


def parse_yaml(text: str) -> Any:
    """The value of a YAML text.

    Raises:
        LabError: not YAML; the message names line and column.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError:
        reason = "nested too deeply"
    except (
        yaml.YAMLError,
        ValueError,
        KeyError,
        OverflowError,
    ) as error:  # !!int x is a ValueError, !!bool x a KeyError
        reason = " ".join(str(error).split()).replace('in "<unicode string>", ', "at ")
    raise LabError(f"not readable as YAML: {reason}")


def read_yaml(path: str | Path) -> Any:
    """The value of a YAML file.

    Raises:
        LabError: the file cannot be read, or is not YAML; the message names it.
    """
    file = user_path(path)
    try:
        return parse_yaml(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise LabError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise LabError(f"{path} cannot be read: it is not UTF-8 text") from None
    except LabError as error:
        raise LabError(f"{path}: {error}") from None
