"""A tokenizer as llama.cpp takes it: byte-level BPE, its pattern by llama.cpp's name for it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gguf import GGUFWriter, TokenType
from transformers import PreTrainedTokenizerBase

from labkit.common.errors import LabError

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
THREE_DIGITS = _WORDS + r"\p{N}{1,3}" + _REST  # GLM-4's and Llama 3's
NO_MERGE = "Ā Ā"  # llama.cpp wants a merge; two zero bytes are no token, so that it falls back to the bytes
PATTERNS = {_WORDS + r"\p{N}" + _REST: "qwen2"}


@dataclass(frozen=True)
class Words:
    """A tokenizer for llama.cpp.

    Attributes:
        pre: llama.cpp's name of the pattern that splits a text into words.
        merges: pairs, most frequent first.
        tokens: token by id.
        kinds: the same for their kinds.
    """

    tokenizer: PreTrainedTokenizerBase
    pre: str
    merges: list[str]
    tokens: list[str]
    kinds: list[TokenType]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, rows: int) -> "Words":
        """The tokenizer of a model with ``rows`` rows of embeddings.

        Raises:
            LabError: llama.cpp cannot express it.
        """
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise LabError("gguf needs a tokenizer.json; this model's tokenizer has none")
        facts = json.loads(backend.to_str())
        model = facts["model"]
        if model["type"] != "BPE" or model.get("byte_fallback"):
            kind = "SentencePiece's BPE" if model["type"] == "BPE" else model["type"]
            raise LabError(f"gguf cannot express this tokenizer, {kind}; nearest: byte-level BPE")
        pre = _pre(facts["pre_tokenizer"], bool(model.get("ignore_merges")))
        tokens = [f"[PAD{number}]" for number in range(rows)]
        kinds = [TokenType.UNUSED] * rows
        added = {token["id"]: token["special"] for token in facts["added_tokens"]}
        for token, number in tokenizer.get_vocab().items():
            if number < rows:
                tokens[number], kinds[number] = token, TokenType.NORMAL
                if number in added:
                    kinds[number] = TokenType.CONTROL if added[number] else TokenType.USER_DEFINED
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
        return cls(tokenizer, pre, merges, tokens, kinds)

    def write(self, file: GGUFWriter, ends: list[int]) -> list[str]:
        """The tokenizer's facts; ``ends``: the tokens that end an answer, the most important first.

        Returns the tokens of ``ends`` that the file has no place for.
        """
        file.add_tokenizer_model("gpt2")
        file.add_tokenizer_pre(self.pre)
        file.add_token_list(self.tokens)
        file.add_token_types(self.kinds)
        file.add_token_merges(self.merges or [NO_MERGE])
        add = (file.add_eos_token_id, file.add_eot_token_id, file.add_eom_token_id)
        for add_end, token in zip(add, ends):
            add_end(token)
        tokenizer = self.tokenizer
        if tokenizer.pad_token_id is not None:
            file.add_pad_token_id(tokenizer.pad_token_id)
        first = tokenizer("a").input_ids[:1]
        starts = tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id]
        if tokenizer.bos_token_id is not None:
            file.add_bos_token_id(tokenizer.bos_token_id)
        file.add_add_bos_token(starts)
        if tokenizer.chat_template:
            file.add_chat_template(tokenizer.chat_template)
        return [self.tokens[token] for token in ends[len(add) :]]


def _pre(facts: Mapping[str, Any] | None, ignore_merges: bool) -> str:
    """llama.cpp's name for a pre-tokenizer."""
    parts = facts["pretokenizers"] if facts and facts["type"] == "Sequence" else [facts or {"type": "none"}]
    kinds = [part["type"] for part in parts]
    if any(part.get("add_prefix_space") for part in parts):
        raise LabError("gguf cannot express a tokenizer with a space before each text; nearest: one without")
    if kinds == ["ByteLevel"] and parts[0]["use_regex"]:
        return "gpt-2"
    if kinds == ["Split", "ByteLevel"] and not parts[1]["use_regex"]:
        pattern = parts[0]["pattern"].get("Regex")
        if pattern == THREE_DIGITS:
            return "llama-bpe" if ignore_merges else "glm4"
        if pattern in PATTERNS:
            return PATTERNS[pattern]
    raise LabError(
        f"gguf cannot express how this tokenizer splits words ({', '.join(kinds)}): llama.cpp knows patterns by name, "
        "and the lab those of GPT-2, Llama 3, Qwen 2 and GLM-4"
    )
