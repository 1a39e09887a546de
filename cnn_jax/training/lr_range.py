"""The learning-rate range test: a short training with a learning rate that grows exponentially.

Smith 2017, "Cyclical Learning Rates for Training Neural Networks", section 3.3.
"""

import dataclasses
import math
import pathlib

import jax
import numpy as np
import optax
from jaxtyping import Float
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from cnn_jax.config import schema
from cnn_jax.config.resolve import resolve
from cnn_jax.config.schema import Config
from cnn_jax.report import style
from cnn_jax.system.console import Console
from cnn_jax.system.errors import TrainingError
from cnn_jax.training import initial_weights, probe
from cnn_jax.training.distillation import open_teachers
from cnn_jax.training.loop import make_network, open_dataset, training_batches
from cnn_jax.training.programs import make_programs

# Losses are averaged over this fraction of the steps, half of them before a step.
_WINDOW = 0.1
# The test ends when the mean loss of a window is this many times the mean loss of the first one.
_DIVERGENCE = 1.5
# The suggestion is the learning rate of divergence, divided by this number.
_SAFETY = 10.0
# A change of the mean loss is noise if it is at most this many times its standard error.
_NOISE = 4.0


@dataclasses.dataclass(frozen=True)
class LearningRates:
    """The losses of a range test, and the learning rates that follow from them.

    Attributes:
      rates: The learning rate of each step, in ascending order.
      losses: The training loss of each step.
      smoothed: The mean loss of the steps around each step.
      steepest: The learning rate at which the loss falls fastest, per factor of the rate.
      divergence: The learning rate from which on the loss is larger than at the start; None if it
        stays smaller.
    """

    rates: Float[np.ndarray, " steps"]
    losses: Float[np.ndarray, " steps"]
    smoothed: Float[np.ndarray, " steps"]
    steepest: float
    divergence: float | None

    @property
    def suggestion(self) -> float:
        """A tenth of the rate of divergence, at least the first rate; else the steepest rate."""
        if self.divergence is None:
            return self.steepest
        return max(self.divergence / _SAFETY, float(self.rates[0]))

    def describe(self) -> str:
        """Describes the result in one line."""
        end = (
            f"training diverges at {self.divergence:.2g}"
            if self.divergence
            else f"training does not diverge up to {self.rates[-1]:.2g}"
        )
        return (
            f"--config.optimizer.learning_rate={self.suggestion:.2g} (the loss falls fastest at "
            f"{self.steepest:.2g}; {end})"
        )


def analyse(
    rates: Float[np.ndarray, " steps"],
    losses: Float[np.ndarray, " steps"],
    not_finite_at: float | None = None,
) -> LearningRates:
    """Returns the learning rates that follow from the losses of a range test.

    Args:
      rates: The learning rates, at least three; their logarithms have equal distances.
      losses: The training loss at each rate, finite.
      not_finite_at: The next learning rate, if the loss is not finite there.

    Raises:
      TrainingError: The loss does not fall by more than its noise.
    """
    half = max(1, round(len(losses) * _WINDOW / 2))
    smoothed = np.array(
        [losses[max(0, i - half) : i + half + 1].mean() for i in range(len(losses))]
    )
    lowest = int(np.argmin(smoothed))
    # The standard deviation of the noise is estimated from second differences: they do not contain
    # the trend of the loss, and their variance is 6 times that of the noise. The median is hardly
    # changed by the large losses of a divergence.
    noise = 1.4826 * np.median(np.abs(np.diff(losses, 2))) / math.sqrt(6)
    margin = _NOISE * noise * math.sqrt(1 / (half + 1) + 1 / (2 * half + 1))
    if smoothed[0] - smoothed[lowest] <= margin:
        raise TrainingError(
            f"the loss does not fall between learning rates of {rates[0]:.2g} and {rates[-1]:.2g}; "
            "use another --low and --high, or more --steps"
        )
    # The steepest fall is searched before the minimum only: after it, a loss that diverges jumps up
    # and down, and may fall faster.
    falls = smoothed[: lowest + 1]
    changes = [falls[min(i + half, lowest)] - falls[max(i - half, 0)] for i in range(len(falls))]
    too_large = np.flatnonzero(smoothed[lowest:] > smoothed[0] + margin)
    return LearningRates(
        rates=rates,
        losses=losses,
        smoothed=smoothed,
        steepest=float(rates[np.argmin(changes)]),
        divergence=float(rates[lowest + too_large[0]]) if len(too_large) else not_finite_at,
    )


def measure(config: Config, steps: int, low: float, high: float, console: Console) -> LearningRates:
    """Trains with a learning rate that grows from `low` to `high`, until the loss diverges.

    The schedule of the configuration is not used; everything else is as in a run.

    Args:
      config: A configuration.
      steps: The number of steps, 20 or more.
      low: The learning rate of the first step.
      high: The learning rate of the last step, above `low`.
      console: Shows the progress.

    Raises:
      ConfigError: A key is wrong.
      DataError: The data cannot be used.
      TrainingError: The loss is not finite in the first steps, or does not fall.
    """
    schema.validate(config, jax.device_count())
    config = resolve(config)
    weights = initial_weights.open_initial_weights(config)
    dataset = open_dataset(config, console.track)
    model = make_network(config, dataset)
    rates = np.geomspace(low, high, steps)
    schedule = optax.exponential_decay(low, steps - 1, high / low)
    distillation, teachers = open_teachers(config, dataset) or (None, None)
    programs = make_programs(
        config,
        model,
        schedule,
        dataset.loader.preprocessing,
        dataset.findings.counts["train"],
        distillation,
    )
    state = programs.init_state()
    if weights is not None:
        state, _ = initial_weights.start_from(weights, config, state, dataset.source.class_names)
    if config.train.probe:
        state, _ = probe.fit_head(config, dataset, programs, state, console.track)
    teachers = jax.tree.map(programs.layout.to_all_devices, teachers)
    pixels = programs.send_pixels(dataset.loader)
    stream = training_batches(config, dataset, stop=steps)
    losses: list[float] = []
    window, not_finite_at = round(steps * _WINDOW), None
    with stream as batches:
        for batch in console.track(batches, "testing learning rates", steps):
            program, arrays = programs.send([batch])
            state, metrics = program(state, arrays, pixels, teachers)
            loss = float(jax.device_get(metrics.loss_sum).sum()) / config.train.batch_size
            if not math.isfinite(loss):
                not_finite_at = float(rates[len(losses)])
                break
            losses.append(loss)
            if np.mean(losses[-window:]) > _DIVERGENCE * np.mean(losses[:window]):
                break
    if len(losses) <= window or np.mean(losses[:window]) > 2 * losses[0]:
        raise TrainingError(
            f"the training diverges at once, at a learning rate of {low:g}; use a smaller --low"
        )
    return analyse(rates[: len(losses)], np.array(losses), not_finite_at)


def draw(result: LearningRates, path: pathlib.Path) -> None:
    """Draws the losses, and marks the suggestion, as a PNG file."""
    theme = style.THEMES[0]
    figure = Figure(figsize=(5.0, 3.4), dpi=style.DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = style.plain(figure.subplots(), theme)
    axes.plot(result.rates, result.losses, color=theme.line, linewidth=1, label="each step")
    axes.plot(result.rates, result.smoothed, color=theme.accent, label="mean")
    axes.axvline(result.suggestion, color=theme.ink, linewidth=0.9, linestyle=(0, (2, 2)))
    axes.annotate(
        f"suggestion: {result.suggestion:.2g}",
        (result.suggestion, 1),
        xycoords=("data", "axes fraction"),
        xytext=(0, 3),
        textcoords="offset points",
        ha="center",
        size=style.TEXT_SIZE,
        color=theme.ink,
    )
    lowest, start = result.losses.min(), max(result.smoothed[0], result.losses[0])
    margin = start - lowest
    axes.set(
        xscale="log",
        ylim=(lowest - 0.05 * margin, start + 0.3 * margin),
        xlabel="learning rate",
        ylabel="training loss (nats)",
    )
    axes.minorticks_off()
    style.legend(axes, theme, loc="lower left")
    figure.savefig(path)
