"""Make the small fonts in assets/fonts from those of Debian packages.

    apt-get download fonts-noto-cjk fonts-noto-cjk-extra fonts-lxgw-wenkai fonts-smiley-sans \
        fonts-wqy-microhei fonts-roboto-unhinted fonts-inter fonts-lato fonts-cantarell fonts-open-sans
    for package in *.deb; do dpkg -x $package unpacked; done
    python -m labkit.models.pocket.training.fonts unpacked

Needs fonttools (development only). Characters kept: ASCII, common punctuation, every character of
`labkit.phonetap.words`, and those already listed in assets/fonts/characters.txt, which began as the 1,500
commonest Chinese characters. One font (`FULL`) keeps all 3,755 characters of GB 2312's first level instead.
The family names are changed, as the licences ask of modified fonts with reserved names.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from labkit.phonetap import words
from labkit.phonetap.drawing.fonts import FULL, PUNCTUATION, fonts_folder, gb2312_first_level

ASCII = "".join(map(chr, range(32, 127)))
# file in assets/fonts, its source below the unpacked packages, and which font of a collection
SOURCES: tuple[tuple[str, str, int], ...] = (
    ("zh-hei.otf", "opentype/noto/NotoSansCJK-Regular.ttc", 2),
    ("zh-hei-medium.otf", "opentype/noto/NotoSansCJK-Medium.ttc", 2),
    ("zh-kai.ttf", "truetype/lxgw-wenkai/LXGWWenKai-Regular.ttf", 0),
    ("zh-oblique.ttf", "truetype/smiley-sans/SmileySans-Oblique.ttf", 0),
    ("zh-micro.ttf", "truetype/wqy/wqy-microhei.ttc", 0),
    ("en-grotesk.ttf", "truetype/roboto/unhinted/RobotoTTF/Roboto-Regular.ttf", 0),
    ("en-grotesk-medium.ttf", "truetype/roboto/unhinted/RobotoTTF/Roboto-Medium.ttf", 0),
    ("en-condensed.ttf", "truetype/roboto/unhinted/RobotoCondensed-Regular.ttf", 0),
    ("en-neo.otf", "opentype/inter/Inter-Regular.otf", 0),
    ("en-neo-semibold.otf", "opentype/inter/Inter-SemiBold.otf", 0),
    ("en-humanist.ttf", "truetype/lato/Lato-Regular.ttf", 0),
    ("en-cant.otf", "opentype/cantarell/Cantarell-Regular.otf", 0),
    ("en-open.ttf", "truetype/open-sans/OpenSans-Regular.ttf", 0),
)
_DROPPED_TABLES = ["GSUB", "GPOS", "GDEF", "BASE", "VORG", "vhea", "vmtx", "DSIG", "kern", "FFTM", "meta"]


def characters_of(value: object) -> set[str]:
    """Every character of every string inside nested dicts, lists and tuples."""
    if isinstance(value, str):
        return set(value)
    if isinstance(value, dict):
        return characters_of(list(value.items()))
    if isinstance(value, (list, tuple, set, frozenset)):
        return set().union(*map(characters_of, value)) if value else set()
    return set()


def wanted_characters() -> set[str]:
    """Characters that `words` can write, with those listed in characters.txt."""
    listed = fonts_folder() / "characters.txt"
    known = listed.read_text(encoding="utf-8") if listed.exists() else ""
    found = characters_of([value for name, value in vars(words).items() if not name.startswith("__")])
    return {c for c in found | set(known) | set(PUNCTUATION) if c.isprintable()} - set(ASCII)


def subset_font(source: Path, number: int, target: Path, characters: set[str]) -> None:
    """Write the font with `characters` only, unhinted, without layout features, under a name of its own."""
    from fontTools import subset
    from fontTools.ttLib import TTFont

    options = subset.Options()
    options.hinting = False
    options.layout_features = []
    options.glyph_names = False
    options.name_IDs = [0, 1, 2, 3, 4, 5, 6, 13, 14]
    options.drop_tables += _DROPPED_TABLES
    font = TTFont(
        source, fontNumber=number if source.suffix == ".ttc" else -1, lazy=True, recalcTimestamp=False
    )
    cutter = subset.Subsetter(options)
    cutter.populate(unicodes=sorted(map(ord, characters)))
    cutter.subset(font)
    name = f"PhoneTap {target.stem}"
    for record in list(font["name"].names):
        if record.nameID in (1, 3, 4):
            record.string = name
        elif record.nameID == 6:
            record.string = name.replace(" ", "")
    subset.save_font(font, str(target), options)


def main() -> None:
    parser = argparse.ArgumentParser(description="Subset Debian's fonts into assets/fonts.")
    parser.add_argument("unpacked", type=Path, help="folder that the packages were unpacked into")
    root = parser.parse_args().unpacked / "usr/share/fonts"
    missing = [source for _, source, _ in SOURCES if not (root / source).exists()]
    if missing:
        parser.error(f"not below {root}: {', '.join(missing)}")
    chinese = wanted_characters()
    (fonts_folder() / "characters.txt").write_text("".join(sorted(chinese)) + "\n", encoding="utf-8")
    for name, source, number in SOURCES:
        extra = set(PUNCTUATION)
        if name.startswith("zh"):
            extra = chinese | gb2312_first_level() if name == FULL else chinese
        subset_font(root / source, number, fonts_folder() / name, set(ASCII) | extra)
        print(f"{name}: {(fonts_folder() / name).stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
