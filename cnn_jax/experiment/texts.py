"""Describes the results of comparisons and experiments as text."""

from collections.abc import Mapping
from typing import Any

from cnn_jax.registry.split import ARMS, CHALLENGER_ARM
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
            "the largest: "
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
    """Returns the head and the rows of a table with a column for each arm."""
    metric, versions = _metric(result), _versions(result)
    values = {"version": [str(versions[arm]) for arm in ARMS]}
    if "correct" in result:
        count, correct = result["images"], [result["correct"][arm] for arm in ARMS]
        values["correct labelled images"] = [f"{one:,} of {count:,}" for one in correct]
        values[metric] = [_percent(one / count if count else None) for one in correct]
    arms = [result["arms"][arm] for arm in ARMS] if "arms" in result else []
    if arms and "units" in arms[0]:
        for name in ("units", "pending", "with_outcome"):
            values[name.replace("_", " ")] = [f"{arm[name]:,}" for arm in arms]
        values[f"mean {metric}"] = [_percent(arm["mean"]) for arm in arms]
    if arms:
        values["images"] = [f"{arm['images']:,}" for arm in arms]
        values["failed requests"] = [f"{arm['failures']:,}" for arm in arms]
        for name, title in (("median", "median"), ("p95", "95 % quantile")):
            times = [arm[f"{name}_milliseconds"] for arm in arms]
            values[f"milliseconds, {title}"] = ["-" if t is None else f"{t:.1f}" for t in times]
    return ["arm", *ARMS], [[name, *cells] for name, cells in values.items()]


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


def _e_value(value: float) -> str:
    return f"over {_LARGE:,.0f}" if value > _LARGE else f"{value:.3g}"
