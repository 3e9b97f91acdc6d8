"""Small tokenizers of several kinds: what they make of the same text differs."""

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

TAGS = ["<think>", "</think>", "<answer>", "</answer>"]
CONTROL = ["</s>", "<s>", "<unk>", "<|user|>", "<|image|>", "[MASK]"]
LETTERS = [chr(code) for code in range(33, 127)]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SPACE = "\u2581"


def byte_level(normalizer=None, tags_are_special=False):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [('"', ":"), ("{", '"'), ("<", "/"), ('"', ")"), ("æ", "Ĺ"), ("\\", '"'), ("t", "h")]
    pieces = [*CONTROL, *alphabet, *("".join(pair) for pair in merges)]
    fast = Tokenizer(models.BPE({piece: index for index, piece in enumerate(pieces)}, merges))
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    if normalizer is not None:
        fast.normalizer = normalizer
    return _wrapped(fast, tags_are_special)


def sentencepiece():
    """Letters, and single bytes for all else; spaces are ``▁``."""
    pieces = [*CONTROL, *BYTES, SPACE, *LETTERS, f"{SPACE}a", "日", SPACE * 2]
    merges = [(SPACE, "a"), (SPACE, SPACE)]
    fast = Tokenizer(
        models.BPE(
            {piece: index for index, piece in enumerate(pieces)},
            merges,
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    fast.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    fast.decoder = _joined()
    made = _wrapped(fast)
    made.add_tokens([AddedToken(SPACE * 2, normalized=False)])  # merges make it too, as in Gemma's
    return made


def unigram(byte_fallback=True):
    """As T5's: text is normalized; without ``byte_fallback`` most characters cannot be written."""
    vocabulary = [(piece, 0.0) for piece in CONTROL]
    vocabulary += [(piece, -9.0) for piece in BYTES] if byte_fallback else []
    vocabulary += [(piece, -3.0) for piece in [SPACE, *LETTERS, f"{SPACE}a", "th"]]
    fast = Tokenizer(models.Unigram(vocabulary, unk_id=2, byte_fallback=byte_fallback))
    fast.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(" ", SPACE)])
    fast.decoder = _joined()
    return _wrapped(fast)


def wordpiece():
    pieces = ["[UNK]", *CONTROL, *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    fast = Tokenizer(
        models.WordPiece({piece: index for index, piece in enumerate(pieces)}, unk_token="[UNK]")
    )
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    return _wrapped(fast)


KINDS = {
    "bytes": byte_level,
    "bytes, control characters dropped": lambda: byte_level(
        normalizers.BertNormalizer(handle_chinese_chars=False, strip_accents=False, lowercase=False)
    ),
    "bytes, special tags": lambda: byte_level(tags_are_special=True),
    "sentencepiece": sentencepiece,
    "unigram": unigram,
}


def _joined():
    return decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )


def _wrapped(fast, tags_are_special=False):
    made = PreTrainedTokenizerFast(
        tokenizer_object=fast, eos_token="</s>", pad_token="</s>", extra_special_tokens=CONTROL[1:]
    )
    made.add_tokens([AddedToken(tag, normalized=False) for tag in TAGS], special_tokens=tags_are_special)
    return made
