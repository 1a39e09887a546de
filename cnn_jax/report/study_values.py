"""Selects trials of a study, and scales and formats the monitored value and the parameters."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from cnn_jax.report import texts

Study = Mapping[str, Any]
Trial = Mapping[str, Any]
# The search range of a parameter: its kind, and either its two ends or its choices.
Range = Mapping[str, Any]

# The text that the page shows for a missing value.
MISSING = "\N{EN DASH}"
# A value is near an end of its range if the distance is at most this fraction of the range.
_EDGE = 0.05


# Functions that select trials.


def is_number(value: object) -> bool:
    """Returns whether a value is a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)


def sorted_trials(study: Study) -> list[Trial]:
    """Returns all trials, sorted by number."""
    return sorted(study["trials"], key=lambda trial: trial["number"])


def trials_with_value(study: Study) -> list[Trial]:
    """Returns the trials with a finite value, sorted by number."""
    return [trial for trial in sorted_trials(study) if is_number(trial["value"])]


def comparable_trials(study: Study) -> list[Trial]:
    """Returns the trials that have a value and have not failed, sorted by number."""
    return [trial for trial in trials_with_value(study) if trial["state"] != "failed"]


def complete_trials(study: Study) -> list[Trial]:
    """Returns the complete trials with a value, sorted by number."""
    return [trial for trial in trials_with_value(study) if trial["state"] == "complete"]


def best_trial(study: Study) -> Trial | None:
    """Returns the best trial; None if the study has no best trial yet."""
    return next((trial for trial in study["trials"] if trial["number"] == study["best"]), None)


def running_best(study: Study) -> tuple[list[int], list[float]]:
    """Returns the numbers of the complete trials, and the best value up to each of these trials."""
    trials = complete_trials(study)
    better = np.maximum if _is_rising(study) else np.minimum
    values = np.array([trial["value"] for trial in trials], float)
    return [trial["number"] for trial in trials], better.accumulate(values).tolist()


def sorted_importance(study: Study) -> dict[str, float]:
    """Returns the importance of each parameter, 0 to 1, in decreasing order."""
    return dict(sorted((study["importance"] or {}).items(), key=lambda item: -item[1]))


def _is_rising(study: Study) -> bool:
    return study["direction"] == "maximize"


# The scale and the format of the monitored value.


@dataclasses.dataclass(frozen=True)
class Scale:
    """The format of the monitored value, and the ends of its axis.

    Attributes:
      name: The name of the value, such as "validation accuracy".
      is_fraction: Whether the value is written in percent.
      is_rising: Whether larger values are better.
      low: The lower end of the axis.
      high: The upper end of the axis.
    """

    name: str
    is_fraction: bool
    is_rising: bool
    low: float
    high: float

    @property
    def label(self) -> str:
        """The label of the value axis."""
        return f"{self.name} (%)" if self.is_fraction else self.name

    @property
    def digits(self) -> int:
        """The number of decimals that the tick labels of the axis need."""
        span = (self.high - self.low) * (100 if self.is_fraction else 1)
        return min(max(1 - math.floor(math.log10(span)), 0), 6)

    def format_value(self, value: float | None) -> str:
        """Formats a value with its unit, such as "93.45 %"; a loss has four decimals."""
        if value is None or not math.isfinite(value):
            return MISSING
        return texts.percent(value, 2) if self.is_fraction else f"{value:.4f}"

    def format_tick(self, value: float, more: int = 0) -> str:
        """Formats a value as a tick label, without a percent sign.

        Args:
          value: The value.
          more: The number of decimals to add to those of the other tick labels.
        """
        return f"{value * (100 if self.is_fraction else 1):.{self.digits + more}f}"

    def clip(self, values: Sequence[float]) -> list[float]:
        """Clips values to the range of the axis."""
        return np.clip(values, self.low, self.high).tolist()

    def position(self, value: float) -> float:
        """Returns the position of a value on the axis: 0 at the lower end, 1 at the upper end."""
        return (self.clip([value])[0] - self.low) / (self.high - self.low)

    def qualities(self, positions: Float[np.ndarray, "positions"]) -> list[float]:
        """Converts positions on the axis to qualities, 0 (worst) to 1 (best).

        A position is 0 at the lower end of the axis and 1 at the upper end. If smaller values are
        better, as for a loss, the quality is 1 minus the position.
        """
        return (positions if self.is_rising else 1 - positions).tolist()


def value_scale(study: Study, values: Sequence[float], reach: float = 3) -> Scale:
    """Returns the scale for values of the monitored metric: their format and the ends of the axis.

    The axis extends from the best value to the worst value, but its length is at most `reach`
    times the distance between the best value and the median. Without this limit, a few trials
    that learn nothing would make the differences between good trials invisible.

    Args:
      study: The study, with its monitored metric and direction.
      values: Finite values; the sequence may be empty.
      reach: The limit on the length of the axis, 1 or more.
    """
    is_rising = _is_rising(study)
    is_fraction = not study["monitor"].endswith("loss")
    name = study["monitor"].replace("_", " ").replace("f1", "F1")
    if not len(values):
        return Scale(name, is_fraction, is_rising, 0.0, 1.0)
    low, high, median = float(np.min(values)), float(np.max(values)), float(np.median(values))
    if is_rising and median < high:
        low = max(low, high - reach * (high - median))
    elif not is_rising and median > low:
        high = min(high, low + reach * (median - low))
    if high - low < 1e-9:
        margin = max(0.01 * abs(high), 1e-3)
        low, high = low - margin, high + margin
    return Scale(name, is_fraction, is_rising, low, high)


def scale_for_all_trials(study: Study) -> Scale:
    """Returns the scale for the values of all trials."""
    return value_scale(study, [trial["value"] for trial in trials_with_value(study)])


def scale_for_complete_trials(study: Study) -> Scale:
    """Returns the scale for the values of complete trials, or of all trials if none is complete.

    Pruned trials are left out, because most of them have worse values after fewer epochs.
    """
    trials = complete_trials(study) or trials_with_value(study)
    return value_scale(study, [trial["value"] for trial in trials])


# The values and ranges of parameters.


def parameter_value(trial: Trial, key: str) -> Any:
    """Returns a trial's value of a parameter; NaN if the trial has no value for the parameter."""
    return trial["params"].get(key, math.nan)


def range_position(range_: Range, value: Any) -> float:
    """Returns the position of a parameter's value in the parameter's range.

    Args:
      range_: The kind of the range, and its ends or its choices.
      value: The value; NaN if the trial has no value for the parameter.

    Returns:
      0 at the lower end and 1 at the upper end, on the log scale if the range is searched on the
      log scale. Choices are evenly spaced. The position is 0.5 in a range with a single
      value, and NaN for a value that is not in the range.
    """
    if range_["kind"] == "categorical":
        choices = range_["choices"]
        if value not in choices:
            return math.nan
        return choices.index(value) / (len(choices) - 1) if len(choices) > 1 else 0.5
    if not is_number(value):
        return math.nan
    low, high = range_["low"], range_["high"]
    if low == high:
        return 0.5
    if range_["log"]:
        return math.log(value / low) / math.log(high / low) if value > 0 else math.nan
    return (value - low) / (high - low)


def range_edge(range_: Range, value: Any) -> str | None:
    """Returns the end of the range that is near a value: "lower", "upper" or None.

    A value is near an end if the distance is at most 5 % of the range. The distance is measured
    on the log scale if the range is searched on the log scale. Choices have no ends.
    """
    position = range_position(range_, value)
    if range_["kind"] == "categorical" or math.isnan(position):
        return None
    # Without the tolerance of 1e-9, rounding errors could exclude a value at exactly 5 %.
    if position <= _EDGE + 1e-9:
        return "lower"
    return "upper" if position >= 1 - _EDGE - 1e-9 else None


def format_number(value: float) -> str:
    """Formats a number with four significant digits, such as "0.0001", "512" or "1e-5"."""
    if abs(value) < 1e6 and (float(value).is_integer() or abs(value) >= 1e4):
        return f"{value:,.0f}"
    mantissa, _, exponent = f"{value:.4g}".partition("e")
    return f"{mantissa}e{int(exponent)}" if exponent else mantissa


def format_parameter(range_: Range, value: Any) -> str:
    """Formats a parameter's value for the page."""
    if isinstance(value, float) and math.isnan(value):
        return MISSING
    return str(value) if range_["kind"] == "categorical" else format_number(value)


def format_range(range_: Range) -> str:
    """Formats the range of a parameter, such as "0.0001 to 0.01, on the log scale".

    The text for a categorical parameter is the list of its choices.
    """
    if range_["kind"] == "categorical":
        return ", ".join(map(str, range_["choices"]))
    scale = ", on the log scale" if range_["log"] else ""
    steps = f" in steps of {format_number(range_['step'])}" if "step" in range_ else ""
    return f"{format_number(range_['low'])} to {format_number(range_['high'])}{steps}{scale}"
