"""What a study says: its trials and their values, where parameters lie, and all that in words."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from cnn_jax.report import texts

Study = Mapping[str, Any]
Trial = Mapping[str, Any]
# A parameter's entry in the study's space: its kind, and its ends or its choices.
Range = Mapping[str, Any]

# Stands for what is not there.
NOTHING = "\N{EN DASH}"
# A value this near to an end of its range, in shares of it, lies at its edge.
_EDGE = 0.05


# Trials.


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def ordered(study: Study) -> list[Trial]:
    return sorted(study["trials"], key=lambda trial: trial["number"])


def valued(study: Study) -> list[Trial]:
    """The trials that have a value, in the order of their numbers."""
    return [trial for trial in ordered(study) if is_number(trial["value"])]


def compared(study: Study) -> list[Trial]:
    """The trials whose parameters can be held against their values."""
    return [trial for trial in valued(study) if trial["state"] != "failed"]


def complete(study: Study) -> list[Trial]:
    """The trials that came to their end with a value."""
    return [trial for trial in valued(study) if trial["state"] == "complete"]


def best_trial(study: Study) -> Trial | None:
    return next((trial for trial in study["trials"] if trial["number"] == study["best"]), None)


def best_so_far(study: Study) -> tuple[list[int], list[float]]:
    """Numbers of the complete trials, and the best value up to each of them."""
    trials = complete(study)
    better = np.maximum if _is_rising(study) else np.minimum
    values = np.array([trial["value"] for trial in trials], float)
    return [trial["number"] for trial in trials], better.accumulate(values).tolist()


def by_importance(study: Study) -> dict[str, float]:
    """The share of each parameter, the largest first."""
    return dict(sorted((study["importance"] or {}).items(), key=lambda item: -item[1]))


def _is_rising(study: Study) -> bool:
    return study["direction"] == "maximize"


# The monitored value.


@dataclasses.dataclass(frozen=True)
class Scale:
    """How the monitored value is written, and what an axis of it shows.

    Attributes:
      name: Such as "validation accuracy".
      is_share: Whether it is written in percent.
      is_rising: Whether the larger value is the better.
      low: The axis's lower end.
      high: Its upper end.
    """

    name: str
    is_share: bool
    is_rising: bool
    low: float
    high: float

    @property
    def label(self) -> str:
        return f"{self.name} (%)" if self.is_share else self.name

    @property
    def digits(self) -> int:
        """So many decimals tell the axis's ticks apart."""
        span = (self.high - self.low) * (100 if self.is_share else 1)
        return min(max(1 - math.floor(math.log10(span)), 0), 6)

    def text(self, value: float | None) -> str:
        """Such as "93.45 %"; a loss has four decimals."""
        if value is None or not math.isfinite(value):
            return NOTHING
        return texts.percent(value, 2) if self.is_share else f"{value:.4f}"

    def tick(self, value: float, more: int = 0) -> str:
        """As an axis has it, whose label says that it is in percent; `more` are more digits."""
        return f"{value * (100 if self.is_share else 1):.{self.digits + more}f}"

    def at_edge(self, values: Sequence[float]) -> list[float]:
        """Values beyond the axis lie at its end."""
        return np.clip(values, self.low, self.high).tolist()

    def place(self, value: float) -> float:
        """Where it lies on the axis: 0 at its lower end and 1 at its upper one."""
        return (self.at_edge([value])[0] - self.low) / (self.high - self.low)

    def qualities(self, places: Float[np.ndarray, "places"]) -> list[float]:
        """How good places on the axis are: 0 at its worse end and 1 at its better one."""
        return (places if self.is_rising else 1 - places).tolist()


def scale_of(study: Study, values: Sequence[float], reach: float = 3) -> Scale:
    """An axis for these values of what the study monitors.

    It ends at the worst of them, but not farther from the best than `reach` times the distance of
    the median from it: a few trials that learn nothing would else leave no room to tell the good
    ones apart.

    Args:
      study: Says what is monitored, and whether it is to rise.
      values: Any number of them, all finite.
      reach: At least 1.
    """
    is_rising = _is_rising(study)
    is_share = not study["monitor"].endswith("loss")
    name = study["monitor"].replace("_", " ").replace("f1", "F1")
    if not len(values):
        return Scale(name, is_share, is_rising, 0.0, 1.0)
    low, high, median = float(np.min(values)), float(np.max(values)), float(np.median(values))
    if is_rising and median < high:
        low = max(low, high - reach * (high - median))
    elif not is_rising and median > low:
        high = min(high, low + reach * (median - low))
    if high - low < 1e-9:
        around = max(0.01 * abs(high), 1e-3)
        low, high = low - around, high + around
    return Scale(name, is_share, is_rising, low, high)


def scale_of_all(study: Study) -> Scale:
    return scale_of(study, [trial["value"] for trial in valued(study)])


def scale_of_complete(study: Study) -> Scale:
    """Where there are complete trials, theirs: most pruned ones are worse for being shorter."""
    trials = complete(study) or valued(study)
    return scale_of(study, [trial["value"] for trial in trials])


# Parameters.


def parameter(trial: Trial, key: str) -> Any:
    """A trial's value for a parameter; NaN, which no choice can be, if it lacks it."""
    return trial["params"].get(key, math.nan)


def place(range_: Range, value: Any) -> float:
    """Where a parameter's value lies in its range.

    Args:
      range_: Its kind, and its ends or its choices.
      value: NaN if the trial lacks it.

    Returns:
      0 at the lower end and 1 at the upper one, on the log scale where the range is searched on
      it. Categories lie at even distances. What has no room to be anywhere else lies at 0.5, and
      a value that is none of the range's has no place: NaN.
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


def edge(range_: Range, value: Any) -> str | None:
    """The end at which a value lies, "lower" or "upper", within 5 % of its range; or None.

    As far as the log scale goes where the range is searched on it. Categories have no ends.
    """
    where = place(range_, value)
    if range_["kind"] == "categorical" or math.isnan(where):
        return None
    # A value right at 5 % counts, whatever rounding makes of it.
    if where <= _EDGE + 1e-9:
        return "lower"
    return "upper" if where >= 1 - _EDGE - 1e-9 else None


def number(value: float) -> str:
    """Of a parameter: four digits that count, such as "0.0001", "512" or "1e-5"."""
    if abs(value) < 1e6 and (float(value).is_integer() or abs(value) >= 1e4):
        return f"{value:,.0f}"
    mantissa, _, exponent = f"{value:.4g}".partition("e")
    return f"{mantissa}e{int(exponent)}" if exponent else mantissa


def parameter_text(range_: Range, value: Any) -> str:
    """A parameter's value as the page has it."""
    if isinstance(value, float) and math.isnan(value):
        return NOTHING
    return str(value) if range_["kind"] == "categorical" else number(value)


def range_text(range_: Range) -> str:
    if range_["kind"] == "categorical":
        return ", ".join(map(str, range_["choices"]))
    scale = ", on the log scale" if range_["log"] else ""
    steps = f" in steps of {number(range_['step'])}" if "step" in range_ else ""
    return f"{number(range_['low'])} to {number(range_['high'])}{steps}{scale}"
