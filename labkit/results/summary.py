"""Quality of many items: rates and means with 95 % intervals, and paired differences."""

from collections.abc import Mapping, Sequence
from typing import Any

from labkit.common.intervals import mean_interval, paired_difference, wilson_interval

GROUPS = ("split", "lang", "target_kind", "speaker")


RATES = {"click_accuracy": "click", "step_success_rate": "success", "parse_rate": "parsed"}


MEANS = {"mean_distance": "distance", "bias_x": "dx", "bias_y": "dy"}


def summarize(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Rates with 95 % Wilson intervals, mean distance and signed bias with 95 % normal intervals.

    Click accuracy is over the items whose right action has a point; an answer without a point is a miss.
    Distance and bias are over the answers with a point. Keys are those of `labkit.Measurement`.
    """
    summary: dict[str, Any] = {
        "items": len(records),
        "clicks": sum(record["click"] is not None for record in records),
    }
    for name, key in RATES.items():
        values = [bool(record[key]) for record in records if record[key] is not None]
        low, high = wilson_interval(sum(values), len(values))
        has_values = bool(values)
        summary[name] = sum(values) / len(values) if has_values else None
        summary[f"{name}_low"], summary[f"{name}_high"] = (low, high) if has_values else (None, None)
    for name, key in MEANS.items():
        values = [record[key] for record in records if record[key] is not None]
        summary[name], summary[f"{name}_low"], summary[f"{name}_high"] = mean_interval(values)
    return summary


def summarize_groups(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """`summarize` for each group: ``{"split=typed": {…}, "lang=zh": {…}, "target_kind=icon": {…}, …}``."""
    groups: dict[str, list] = {}
    for key in GROUPS:
        for value in sorted({str(record[key]) for record in records if record[key] is not None}):
            groups[f"{key}={value}"] = [record for record in records if str(record[key]) == value]
    return {name: summarize(members) for name, members in groups.items()}


def summarize_paired(
    records: Sequence[Mapping[str, Any]], reference: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Differences to another measurement of the same items, overall and in ``splits`` per split.

    ``{"items": n, "click_accuracy": difference, "click_accuracy_low": …, …, "splits": {"typed": {…}}}``;
    negative rates are lower than the reference. Only items in both measurements count.
    """
    other = {record["id"]: record for record in reference}
    pairs = [(record, other[record["id"]]) for record in records if record["id"] in other]
    splits = sorted({record["split"] for record, _ in pairs})
    return {
        **_difference(pairs),
        "splits": {split: _difference([p for p in pairs if p[0]["split"] == split]) for split in splits},
    }


def _difference(pairs: Sequence[tuple[Mapping, Mapping]]) -> dict[str, Any]:
    result: dict[str, Any] = {"items": len(pairs)}
    for name, key in (RATES | {"mean_distance": "distance"}).items():
        both = [(a[key], b[key]) for a, b in pairs if a[key] is not None and b[key] is not None]
        values = paired_difference([a for a, _ in both], [b for _, b in both])
        result[name], result[f"{name}_low"], result[f"{name}_high"] = values
    return result
