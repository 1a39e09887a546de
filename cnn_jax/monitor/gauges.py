"""The result of the monitor as Prometheus gauges, for the textfile collector of node_exporter."""

from collections.abc import Mapping
from typing import Any


def describe_gauges(result: Mapping[str, Any], now: float) -> str:
    """Returns the gauges in the text format of Prometheus.

    Args:
      result: The value of `windows.measure`, with the keys "model" and "version".
      now: The present time in seconds since the epoch.
    """
    own = {"model": str(result["model"]), "version": str(result["version"])}
    lines: list[str] = []

    def add(name: str, meaning: str, value: float, **labels: str) -> None:
        name = f"cnn_jax_monitor_{name}"
        head = [f"# HELP {name} {meaning}", f"# TYPE {name} gauge"]
        if head[0] not in lines:
            lines.extend(head)
        texts = ",".join(f'{key}="{_escape(text)}"' for key, text in {**own, **labels}.items())
        lines.append(f"{name}{{{texts}}} {float(value)!r}")

    add("run_timestamp_seconds", "When the monitor ran.", now)
    add("images", "Images in the request log.", result["images"])
    add("reference_accuracy", "Accuracy on the validation images.", result["reference"]["accuracy"])
    # Labels can show harm without drift.
    has_alarm = bool(result["windows"]) and result["windows"][-1]["alarm"]
    add("drift", "1 if the two latest windows differ.", has_alarm)
    add("harm", "1 if the accuracy has fallen by too much.", result["state"] == "harm")
    if result["labels"]["accuracy"] is not None:
        meaning = "Accuracy on the labelled random sample of the two latest windows."
        add("labelled_accuracy", meaning, result["labels"]["accuracy"])
    if result["windows"]:
        latest = result["windows"][-1]
        meaning = "Estimated accuracy in the latest window."
        add("estimated_accuracy", meaning, latest["estimated_accuracy"])
        for test, p_value in latest["p_values"].items():
            add("p_value", "p-value of a drift test in the latest window.", p_value, test=test)
    return "\n".join(lines) + "\n"


def _escape(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
