"""Output for people: the progress of a command on stderr, and tables as text."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import rich.cells
import rich.console
import rich.progress
import rich.table

from cnn_jax import cli

_TABLE_HEAD = (
    "             ------- train -------   ----- validation ----\n"
    "  epoch      loss  accuracy     F1   loss  accuracy     F1   images/s"
)


def table(head: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> str:
    """A table as text: names left-aligned in the first column, numbers right-aligned in the others.

    A name that leaves too little room for the numbers stands on a line of its own.

    Args:
      head: The names of the columns.
      rows: Cells without line ends.
      width: The width of the terminal, in columns.
    """
    lines = [head, *rows]
    widths = [max(map(rich.cells.cell_len, column)) for column in zip(*lines, strict=True)]
    room = min(widths[0], max(width - sum(widths[1:]) - 2 * len(widths[1:]), 0))
    text = []
    for name, *numbers in lines:
        length = rich.cells.cell_len(name)
        if length > room:
            text.append(cli.wrap(name, width))
            name, length = "", 0
        cells = (f"  {cell:>{size}}" for cell, size in zip(numbers, widths[1:], strict=True))
        text.append(f"{name}{' ' * (room - length)}{''.join(cells)}".rstrip())
    return "\n".join(text)


def _whole() -> rich.table.Column:
    """A column that a narrow terminal does not shorten; the bar gives way to it."""
    return rich.table.Column(no_wrap=True, min_width=11)


class _Screen(rich.console.Console):
    """A console that leaves the cursor where a person sees it, also if the run is killed."""

    def show_cursor(self, show: bool = True) -> bool:
        return False


class Console:
    """Prints lines, and a progress bar where there is a terminal."""

    def __init__(self, *, is_silent: bool = False) -> None:
        """On stderr; or nowhere, for all but one of the processes of a run."""
        self._console = _Screen(stderr=True, highlight=False, markup=False, quiet=is_silent)

    def print(self, text: str = "") -> None:
        """A line as it is, never wrapped or coloured."""
        self._console.print(text, soft_wrap=True)

    def warn(self, text: str) -> None:
        """A line that stands out where colours are shown."""
        self._console.print(f"warning     {text}", style="yellow", soft_wrap=True)

    def facts(self, rows: Mapping[str, str]) -> None:
        """Aligned `name  text` lines; a text may have several lines."""
        for name, text in rows.items():
            first, *others = text.splitlines() or [""]
            self.print(f"{name:<12}{first}")
            for line in others:
                self.print(f"{'':<12}{line}")

    def track(self, items: Iterable, description: str, total: int) -> Iterator:
        """Passes items on, and shows how many of `total` have come."""
        if not self._console.is_terminal:
            self.print(f"{description} ...")
            yield from items
            return
        with self._progress(rich.progress.MofNCompleteColumn()) as progress:
            yield from progress.track(items, total, description=description)

    def _progress(self, *columns: rich.progress.ProgressColumn) -> rich.progress.Progress:
        return rich.progress.Progress(
            rich.progress.TextColumn("{task.description}", table_column=_whole()),
            rich.progress.BarColumn(bar_width=None),
            *columns,
            rich.progress.TimeRemainingColumn(),
            console=self._console,
            transient=True,
            expand=True,
        )

    def training(self, epochs: int, steps_per_epoch: int) -> "TrainingDisplay":
        columns = [rich.progress.TextColumn("{task.fields[rate]}", table_column=_whole())]
        progress = self._progress(*columns) if self._console.is_terminal else None
        return TrainingDisplay(self, progress, epochs, steps_per_epoch)


class TrainingDisplay:
    """The bar over all steps of a run, and a line for each epoch."""

    def __init__(
        self,
        console: Console,
        progress: rich.progress.Progress | None,
        epochs: int,
        steps_per_epoch: int,
    ):
        self._console = console
        self._progress = progress
        self._epochs = epochs
        self._steps_per_epoch = steps_per_epoch

    def __enter__(self) -> "TrainingDisplay":
        if self._progress is not None:
            self._progress.start()
            self._task = self._progress.add_task(
                "", total=self._epochs * self._steps_per_epoch, rate=""
            )
        return self

    def __exit__(self, *exception: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def start(
        self,
        history: Sequence[Mapping[str, Any]],
        best: Mapping[str, Any] | None,
        first_step: int,
    ) -> None:
        """The head of the table, and the lines of the epochs that are done already."""
        if first_step:
            self._console.print(f"goes on from step {first_step:,}")
        self._console.print(_TABLE_HEAD)
        for record in history:
            self.epoch(record, is_best=record is best)

    def step(self, step: int, loss: float, images_per_second: float) -> None:
        """Moves the bar: `step` steps are done, the last with this loss."""
        if self._progress is None:
            return
        epoch = min(step // self._steps_per_epoch + 1, self._epochs)
        self._progress.update(
            self._task,
            completed=step,
            description=f"epoch {epoch}/{self._epochs}",
            rate=f"loss {loss:.3f}  {images_per_second:,.0f} img/s" if images_per_second else "",
        )

    def epoch(self, record: Mapping[str, Any], *, is_best: bool) -> None:
        """The line of a finished epoch; `is_best` marks the best so far."""
        figures = "   ".join(
            f"{record[f'{split}_loss']:>5.3f}  {record[f'{split}_accuracy']:>7.2%}"
            f" {record[f'{split}_f1']:>7.2%}"
            for split in ("train", "validation")
        )
        self._console.print(
            f"{record['epoch']:>4}/{self._epochs:<4}   {figures}   "
            f"{record['images_per_second']:>8,.0f}{'  best' if is_best else ''}"
        )
