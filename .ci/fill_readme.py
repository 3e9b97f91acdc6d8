"""Writes the figures of assets/results into the READMEs: ``make readme``; ``--check`` only says what is old.

Between the lines ``<!-- figures:begin -->`` and ``<!-- figures:end -->`` stands what this makes of
results.json: the picture, the table, and what it was measured with; between ``libraries:begin`` and ``libraries:end``
the perplexities of the lab's quantizers and of other libraries'; in the cards of the shipped models, their accuracy
by split, language, target and speaker. `PAGES` says which page holds which. Nothing there is written by hand.
"""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from labkit.measure.perplexity import Perplexities
from labkit.results.charts.svg import comparison_svg
from labkit.results.comparison import Comparison, describe
from labkit.results.measurement import Measurement
from labkit.results.tables import cost_table, quality_table, reference_of

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path("assets/results/pocket-cpu/results.json")
PICTURE = Path("assets/images/comparison.svg")
CARDS = {
    Path("assets/pocket/README.md"): Path("assets/results/pocket-quality/results.json"),
    Path("assets/pocket-glm4v/README.md"): Path("assets/results/pocket-glm4v/results.json"),
}
"""Cards of the shipped models, and what they did on the test items."""
PERPLEXITIES = Path("assets/results/smollm2-perplexity")
OURS, PEERS = PERPLEXITIES / "perplexity.json", PERPLEXITIES / "peers.json"
FIGURES, LIBRARIES = "figures", "libraries"
PAGES = {FIGURES: "README", LIBRARIES: "labkit/measure/README"}
"""The page that holds each pair of marks, without its language's ending."""

WORDS: dict[str, dict[str, str]] = {
    ".md": {
        "alt": "Weights, time of an answer and right steps of the pocket model under {count} plans",
        "columns": "Plan|Weights|vs {reference}|First token|Decoding|A whole answer|vs {reference}"
        "|Click accuracy [95 %]|Right steps [95 %]|vs {reference}, paired points [95 %]",
        "claim": "*article's claim*",
        "loss": "loss",
        "made": "Measured on {date} UTC with `{command}`: {settings}; {cpu}, Python {python}, torch {torch}, "
        "transformers {transformers}. Samples and environment: [{path}]({path}).",
        "libraries": "Quantizer|Bits a value|Perplexity|vs unquantized [95 %]|KL, nats a token",
        "compared": "{model}, groups of 64, {calibration} calibration sequences of {length} tokens, {validation} judged, "
        "of the same text. Losses of each sequence and environment: [{ours}]({ours}), [{peers}]({peers}).",
    },
    ".zh-CN.md": {
        "alt": "口袋模型在 {count} 种方案下的权重大小、回答时间与正确步骤",
        "columns": "方案|权重|相比 {reference}|首个词元|解码速度|完整回答|相比 {reference}"
        "|点击准确率 [95 %]|正确步骤 [95 %]|与 {reference} 逐题配对之差(百分点)[95 %]",
        "settings": "模型 {model},设备 {device},{threads} 线程,{items} 道测试题(split={split},seed={seed}),"
        "thinking={enable_thinking}",
        "claim": "*文章的说法*",
        "loss": "损失",
        "made": "测量于 {date}(UTC),命令 `{command}`:{settings};{cpu},Python {python},torch {torch},"
        "transformers {transformers}。原始样本与环境记录:[{path}]({path})。",
        "libraries": "量化器|每值位数|困惑度|相比未量化 [95 %]|KL(纳特每词元)",
        "compared": "{model},每组 64 个值,{calibration} 个长 {length} 词元的校准序列,{validation} 个序列用于评判,"
        "取自同一文本。每个序列的损失与环境记录:[{ours}]({ours})、[{peers}]({peers})。",
    },
}


def load(root: Path = ROOT) -> Comparison | None:
    """The comparison whose figures the READMEs show; None as long as none is in the folder."""
    return Comparison.load(root / RESULTS) if (root / RESULTS).exists() else None


def block(comparison: Comparison, words: Mapping[str, str]) -> str:
    """What stands between the marks, for the README whose `words` are given."""
    measurements, where = comparison.measurements, comparison.environment
    told = describe(comparison.settings)
    made = {
        "date": where["time"].partition("T")[0],
        "command": " ".join(where["command"]),
        "settings": words["settings"].format(**comparison.settings) if "settings" in words else told,
        "path": linked(RESULTS, FIGURES),
        **{name: where[name] for name in ("cpu", "python")},
        **{name: where["packages"][name] for name in ("torch", "transformers")},
    }
    picture = f"![{words['alt'].format(count=len(measurements))}]({linked(PICTURE, FIGURES)})"
    return "\n\n".join([picture, table(measurements, words), words["made"].format(**made)])


def table(measurements: Sequence[Measurement], words: Mapping[str, str]) -> str:
    """A Markdown table of the numbers that `labkit compare` prints, the article's claim in the last line."""
    reference = reference_of(measurements)
    headers = words["columns"].format(reference=reference.plan if reference else "–").split("|")
    lines = [headers, ["---"] + ["---:"] * (len(headers) - 1)]
    for cost, quality in zip(cost_table(measurements)[1], quality_table(measurements)[1]):
        lines.append([cost[0], *cost[1:3], *cost[5:9], *quality[1:3], quality[5]])
    lines[-1][0] = words["claim"]
    lines[-1][-1] = lines[-1][-1].replace("loss", words["loss"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def card(comparison: Comparison) -> str:
    """What stands between the marks of the model card: the unquantized model's accuracy, whole and by group, and what
    the other plans lose of its right steps, item by item."""
    measured, *others = comparison.measurements
    groups = {"all": measured.to_dict(), **measured.splits}
    lines = [["Items", "Number", "Click accuracy [95 %]", "Step success [95 %]", "Parsed"]]
    lines.append(["---", *["---:"] * 4])
    for name, group in groups.items():
        shares = [_share(group, key) for key in ("click_accuracy", "step_success_rate")]
        lines.append([name.replace("=", ": "), str(group["items"]), *shares, f"{group['parse_rate']:.1%}"])
    where = comparison.environment
    command, date = " ".join(where["command"]), where["time"].partition("T")[0]
    made = f"Measured on {date} UTC with `{command}`; plan {measured.plan}, commit {(where['commit'] or 'unknown')[:12]}."
    tables = [lines]
    if others:
        splits = sorted(others[0].paired["splits"])
        losses = [
            ["Right steps, paired points [95 %]", "all", *splits],
            ["---", *["---:"] * (len(splits) + 1)],
        ]
        for other in others:
            pairs = [other.paired, *(other.paired["splits"][split] for split in splits)]
            losses.append([f"{other.plan} against {measured.plan}", *map(_points, pairs)])
        tables.append(losses)
    drawn = ["\n".join(f"| {' | '.join(line)} |" for line in table) for table in tables]
    return "\n\n".join([*drawn, made])


def _points(pair: Mapping[str, Any]) -> str:
    low, high = (100 * pair[f"step_success_rate_{end}"] for end in ("low", "high"))
    return f"{100 * pair['step_success_rate']:+.1f} [{low:+.1f}, {high:+.1f}]"


def _share(group: Mapping[str, Any], key: str) -> str:
    if group.get(key) is None:
        return "–"
    return f"{group[key]:.1%} [{group[f'{key}_low']:.1%}, {group[f'{key}_high']:.1%}]"


def libraries(root: Path, words: Mapping[str, str]) -> str:
    """What stands between the second marks: the lab's quantizers and other libraries', the best first; empty as long as
    nothing is in the folder."""
    if not (root / OURS).exists() or not (root / PEERS).exists():
        return ""
    ours, peers = (Perplexities.load(root / file) for file in (OURS, PEERS))
    reference, *mine = ours.records
    named = [{**one, "plan": f"labkit `{one['plan']}`"} for one in mine]
    named += [{**one, "plan": f"{one['library']} {one['version']} `{_own(one)}`"} for one in peers.records]
    rows = Perplexities(ours.settings, [reference, *named]).rows()
    lines = [words["libraries"].split("|"), ["---", *["---:"] * 4]]
    for row in [rows[0], *sorted(rows[1:], key=lambda row: row["perplexity"])]:
        change = f"{row['change']:+.1%} [{row['low']:+.1%}, {row['high']:+.1%}]".replace("-", "−")
        figures = [f"{row['bits']:.2f}", f"{row['perplexity']:.2f}", change, f"{row['kl']:.1e}"]
        lines.append([row["plan"], *(figures if row is not rows[0] else [*figures[:2], "", ""])])
    settings = {
        **ours.settings["material"],
        "model": "SmolLM2-135M",
        "ours": linked(OURS, LIBRARIES),
        "peers": linked(PEERS, LIBRARIES),
    }
    drawn = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{drawn}\n\n{words['compared'].format(**settings)}"


def _own(record: Mapping[str, Any]) -> str:
    """A peer's name without its library's, and ``default`` if nothing is left."""
    library = record["library"].replace("llmcompressor", "llm-compressor")
    return record["plan"].removeprefix(library).strip("-") or "default"


def filled(text: str, inside: str, name: str, mark: str = FIGURES) -> str:
    """`text` with `inside` between the marks. Raises SystemExit unless they are there once, in order."""
    first, last = marks(mark)
    before, begin, rest = text.partition(first)
    _, end, after = rest.partition(last)
    if not begin or not end or first in after or last in before:
        raise SystemExit(f"{name}: the lines {first} and {last} are needed once each, in this order")
    return f"{before}{first}\n{inside}\n{last}{after}" if inside else f"{before}{first}\n{last}{after}"


def linked(path: Path, mark: str) -> str:
    """`path` as a link in the page that holds ``mark``."""
    return Path(os.path.relpath(path, Path(PAGES[mark]).parent)).as_posix()


def marks(mark: str) -> tuple[str, str]:
    """The lines between which what is called ``mark`` stands."""
    return f"<!-- {mark}:begin -->", f"<!-- {mark}:end -->"


def wanted(root: Path = ROOT) -> dict[Path, str | None]:
    """Every file that depends on the results, and what should be in it; None: it should not be there."""
    comparison = load(root)
    files: dict[Path, str | None] = {PICTURE: None}
    if comparison is not None:
        caption = describe(comparison.settings)
        files[PICTURE] = comparison_svg(comparison.measurements, caption)
    for ending, words in WORDS.items():
        inside = {FIGURES: block(comparison, words) if comparison else "", LIBRARIES: libraries(root, words)}
        for mark, page in PAGES.items():
            name = page + ending
            files[Path(name)] = filled((root / name).read_text(encoding="utf-8"), inside[mark], name, mark)
    for page, measured in CARDS.items():
        if (root / page).exists() and (root / measured).exists():
            text = (root / page).read_text(encoding="utf-8")
            files[page] = filled(text, card(Comparison.load(root / measured)), page.as_posix())
    return files


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(description="Write the figures of assets/results into the READMEs.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if something is old")
    options = parser.parse_args(arguments)
    old: list[Any] = []
    for name, text in wanted(root).items():
        path = root / name
        if (path.read_text(encoding="utf-8") if path.exists() else None) == text:
            continue
        old.append(name)
        if options.check:
            continue
        if text is None:
            path.unlink()
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    for name in old:
        print(f"{name}: {'differs from' if options.check else 'written from'} {RESULTS.parents[1]}")
    return 1 if old and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
