"""Describes the results of comparisons and experiments as text."""

from collections.abc import Mapping
from typing import Any

from cnn_jax.registry.split import ARMS, CHALLENGER_ARM, CHAMPION_ARM
from cnn_jax.system.text import facts, fill, table

Result = Mapping[str, Any]
# An e-value above this number is written as "over ...".
_LARGE = 1e6


def noun(result: Result) -> str:
    """Returns the word for the observations of a result."""
    return "units" if "units" in result else "labelled images"


def headline(result: Result) -> str:
    """Returns the decision of a result as a sentence."""
    versions = _versions(result)
    count = result.get("units", result.get("images"))
    decision, reason = result["decision"], result.get("reason")
    if decision == "invalid":
        return f"The comparison is not valid: {reason}."
    if reason:
        return f"Version {versions[CHALLENGER_ARM]} must not be promoted: {reason}."
    if decision == "none":
        return f"There is no decision after {count:,} {noun(result)}."
    first, second = ARMS[::-1] if decision == "better" else ARMS
    return (
        f"Version {versions[first]} is better than version {versions[second]} (decided after "
        f"{result['decided_after']:,} {noun(result)})."
    )


def rows(result: Result) -> dict[str, str]:
    """Returns the numbers of a result as text, by their names."""
    metric = _metric(result)
    described = {}
    if result["difference"] is not None:
        low, high = result["interval"]
        described["difference"] = (
            f"{100 * result['difference']:+.2f} points of {metric} (95 % confidence sequence: "
            f"{100 * low:+.2f} to {100 * high:+.2f})"
        )
        described["e-values"] = (
            f"{_e_value(result['e_value_better'])} for better, "
            f"{_e_value(result['e_value_worse'])} for worse; a decision needs "
            f"{result['threshold']:g}"
        )
    if "gains" in result:
        described["images"] = (
            f"{result['gains']:,} correct only with the challenger, {result['losses']:,} only with "
            "the champion"
        )
    if result.get("agreement") is not None:
        described["agreement"] = f"{result['agreement']:.1%} of the images have the same class"
    if result.get("copies"):
        described["left out"] = f"{result['copies']:,} copies of other images"
    return described


def arm_table(result: Result) -> tuple[list[str], list[list[str]]]:
    """Returns the head and the rows of the table of the arms."""
    metric = _metric(result)
    if "arms" not in result:
        head = ["arm", "version", "images", "correct", metric]
        count = result["images"]
        return head, [
            [
                arm,
                str(result["versions"][arm]),
                f"{count:,}",
                f"{result['correct'][arm]:,}",
                _percent(result["correct"][arm] / count if count else None),
            ]
            for arm in ARMS
        ]
    arms = result["arms"]
    has_units = "units" in arms[CHAMPION_ARM]
    names = ["units", "pending", "with_outcome"] if has_units else []
    head = ["arm", "version", *(name.replace("_", " ") for name in names)]
    head += [f"mean {metric}"] * has_units + ["images", "failures", "median ms", "95 % ms"]
    return head, [
        [
            arm,
            str(values["version"]),
            *(f"{values[name]:,}" for name in names),
            *([_percent(values["mean"])] if has_units else []),
            f"{values['images']:,}",
            f"{values['failures']:,}",
            *(_milliseconds(values[f"{name}_milliseconds"]) for name in ("median", "p95")),
        ]
        for arm, values in arms.items()
    ]


def describe(result: Result, width: int) -> str:
    """Describes a result for a terminal.

    Args:
      result: The value of `analysis.analyse` or `replay.replay`.
      width: The width of the terminal, in columns.
    """
    head, cells = arm_table(result)
    lines = [fill(headline(result), width), "", table(head, cells, width), ""]
    lines += facts(rows(result), width)
    for check in result.get("checks", ()):
        state = "passed" if check["passed"] else f"FAILED: {check['problem']}"
        lines += facts({"check": f"{check['name']}: {state}"}, width)
    return "\n".join(lines)


def _versions(result: Result) -> Mapping[str, int]:
    if "versions" in result:
        return result["versions"]
    return {arm: values["version"] for arm, values in result["arms"].items()}


def _metric(result: Result) -> str:
    experiment = result.get("experiment", {})
    if experiment.get("is_shadow", True) or experiment["outcome"] == "label":
        return "accuracy"
    return experiment["outcome"]


def _percent(fraction: float | None) -> str:
    return "-" if fraction is None else f"{fraction:.2%}"


def _milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _e_value(value: float) -> str:
    return f"over {_LARGE:,.0f}" if value > _LARGE else f"{value:.3g}"
