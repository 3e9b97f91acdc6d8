"""What can be read where on a training screen: letters by 14-pixel patch, text tokens by image token. No torch.

The eye learns to read from the letters: a patch must spell the letters whose middle lies in it, which is the most
local and least ambiguous thing that a screen can teach.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np

from labkit.phonetap.drawing.canvas import Written
from labkit.phonetap.drawing.fonts import limited_characters

PATCH = 28  # pixels that one image token covers, in both directions
SPELLED = 4  # at most so many letters are spelled by one patch
READ_TOKENS = 6  # at most so many text tokens stand on one image token
IGNORE = -100
BLANK, OTHER = 0, 1  # letter classes: nothing (more), and a letter without a class of its own


@cache
def letters() -> dict[str, int]:
    """Letter -> class, for every letter that all fonts have; see BLANK and OTHER."""
    return {letter: number for number, letter in enumerate(sorted(limited_characters()), start=OTHER + 1)}


def letters_by_patch(written: Sequence[Written], size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """The patches [P] with letters (in the image processor's order) and their letters' classes [P, SPELLED].

    A letter belongs to the patch that its middle lies in; letters are told from left to right, lines from the top.
    """
    known, half = letters(), PATCH // 2
    columns, rows = size[0] // half, size[1] // half
    patches: dict[int, list[int]] = {}
    for line in sorted(written, key=lambda entry: entry.top + entry.bottom):
        row = int((line.top + line.bottom) / 2 // half)
        if not 0 <= row < rows:
            continue
        # the processor orders patches in groups of 2 x 2, which become one image token
        start = (row // 2 * (columns // 2) * 2 + row % 2) * 2
        edges = line.edges
        for place, letter in enumerate(line.text):
            column = int((edges[place] + edges[place + 1]) / 2 // half)
            if letter != " " and 0 <= column < columns:
                patch = start + column // 2 * 4 + column % 2
                patches.setdefault(patch, []).append(known.get(letter, OTHER))
    at = np.array(sorted(patches), dtype=np.int16)
    classes = np.full((len(at), SPELLED), BLANK, dtype=np.int16)
    for index, patch in enumerate(at.tolist()):
        found = patches[patch][:SPELLED]
        classes[index, : len(found)] = found
    return at, classes


def text_by_token(written: Sequence[Written], size: tuple[int, int], encode) -> tuple[np.ndarray, np.ndarray]:
    """The image tokens [C] with text on them and the text tokens [C, READ_TOKENS] that are drawn there.

    A text token belongs to every image token that holds at least 40 % of its width (or is filled by it) and half its height.
    """
    columns, rows = size[0] // PATCH, size[1] // PATCH
    cells: dict[int, list[int]] = {}
    for line in written:
        height = max(1.0, line.bottom - line.top)
        at_rows = [
            row
            for row in range(max(0, int(line.top // PATCH)), min(rows, int(line.bottom // PATCH) + 1))
            if min(line.bottom, (row + 1) * PATCH) - max(line.top, row * PATCH) >= 0.5 * height
        ]
        encoding = encode.backend.encode(line.text, add_special_tokens=False)
        for token, (start, end) in zip(encoding.ids, encoding.offsets):
            left, right = line.edges[start], line.edges[end]
            needed = 0.4 * min(right - left, PATCH)
            for column in range(max(0, int(left // PATCH)), min(columns, int(right // PATCH) + 1)):
                if min(right, (column + 1) * PATCH) - max(left, column * PATCH) >= needed:
                    for row in at_rows:
                        cells.setdefault(row * columns + column, []).append(token)
    at = np.array(sorted(cells), dtype=np.int16)
    tokens = np.full((len(at), READ_TOKENS), IGNORE, dtype=np.int32)
    for index, cell in enumerate(at.tolist()):
        found = list(dict.fromkeys(cells[cell]))[:READ_TOKENS]
        tokens[index, : len(found)] = found
    return at, tokens
