"""Shows the progress of a command on stderr.

Progress is shown as lines, with a progress bar if stderr is a terminal. In a notebook
the progress is a single output that is updated in place.
"""

import os
import sys
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from typing import Any

import rich.console
import rich.progress
import rich.table

from cnn_jax.system import text
from cnn_jax.system.text import FACT_INDENT, wrap

# The columns of the epoch table, by group: the name and the width of each column.
_GROUPS: dict[str, dict[str, int]] = {
    "train": {"loss": 5, "accuracy": 8, "F1": 7},
    "validation": {"loss": 5, "accuracy": 8, "F1": 7},
    "": {"images/s": 8},
}
# In a narrow terminal, these columns of the epoch table are left out, in this order.
_OPTIONAL_COLUMNS = (
    ("", "images/s"),
    *(("train", "F1"), ("validation", "F1"), ("train", "accuracy"), ("train", "loss")),
)
# The minimum time between two updates of a notebook's output, in seconds.
_UPDATE_SECONDS = 0.5
_NOTEBOOK_WIDTH = 100  # The width of a notebook's output, in columns.
# The maximum number of epochs that a notebook shows; earlier epochs are hidden.
_EPOCHS_SHOWN = 10


def _fixed_column() -> rich.table.Column:
    """Returns a column that keeps its width; in a narrow terminal only the progress bar shrinks."""
    return rich.table.Column(no_wrap=True, min_width=11)


class _Screen(rich.console.Console):
    """A console that never hides the cursor, so that a killed run leaves the cursor visible."""

    def show_cursor(self, show: bool = True) -> bool:
        return False


class Console:
    """Prints lines on stderr, and shows a progress bar if stderr is a terminal."""

    def __init__(self, *, is_silent: bool = False) -> None:
        """Creates a console.

        Args:
          is_silent: Whether to print nothing. Only one process of a run prints.
        """
        self._console = _Screen(
            stderr=True,
            highlight=False,
            markup=False,
            quiet=is_silent,
            force_jupyter=False,
            # The stderr of a notebook claims to be a terminal, but would show each update of the
            # progress bar on a new line.
            force_terminal=False if _is_notebook() else None,
        )

    @property
    def width(self) -> int | None:
        """The width of the terminal in columns, or None if lines may have any length."""
        is_known = self._console.is_terminal or "COLUMNS" in os.environ
        return self._console.width if is_known else None

    def print(self, text: str = "") -> None:
        """Prints a line without colours, broken between words if the terminal is narrow."""
        for line in wrap(text, self.width):
            self.write_line(line)

    def warn(self, text: str) -> None:
        """Prints a warning, in colour if the terminal has colours."""
        for line in wrap(f"warning     {text}", self.width, FACT_INDENT):
            self.write_line(line, "yellow")

    def facts(self, rows: Mapping[str, str]) -> None:
        """Prints names and descriptions in two columns; a description may have several lines."""
        for line in text.facts(rows, self.width):
            self.write_line(line)

    def write_line(self, line: str, style: str | None = None) -> None:
        """Prints a line in a style of `rich`; the line must fit into the terminal."""
        self._console.print(line, style=style, soft_wrap=True)

    def print_epoch(self, line: str) -> None:
        """Prints the line of a finished epoch."""
        self.write_line(line)

    def show_status(self, text: str) -> None:
        """Shows the current activity in a notebook, and nothing in a terminal or file."""

    def track(self, items: Iterable, description: str, total: int) -> Iterator:
        """Yields the items, and shows how many of the `total` items were processed."""
        if not self._console.is_terminal:
            self.print(f"{description} ...")
            yield from items
            return
        with self._progress(rich.progress.MofNCompleteColumn()) as progress:
            yield from progress.track(items, total, description=description)

    def _progress(self, *columns: rich.progress.ProgressColumn) -> rich.progress.Progress:
        return rich.progress.Progress(
            rich.progress.TextColumn("{task.description}", table_column=_fixed_column()),
            rich.progress.BarColumn(bar_width=None),
            *columns,
            rich.progress.TimeRemainingColumn(),
            console=self._console,
            transient=True,
            expand=True,
        )

    def training(self, epochs: int, steps_per_epoch: int) -> "TrainingDisplay":
        """Returns the progress display of a training run."""
        columns = [rich.progress.TextColumn("{task.fields[rate]}", table_column=_fixed_column())]
        progress = self._progress(*columns) if self._console.is_terminal else None
        return TrainingDisplay(self, progress, epochs, steps_per_epoch)


class NotebookConsole(Console):
    """A console for notebooks: one output, updated in place, that shows only the latest epochs."""

    def __init__(self) -> None:
        super().__init__()
        # The text of each line, and whether the line describes an epoch.
        self._lines: list[tuple[str, bool]] = []
        self._status = ""
        self._output: Any = None
        self._updated = 0.0

    @property
    def width(self) -> int:
        return _NOTEBOOK_WIDTH

    def write_line(self, line: str, style: str | None = None) -> None:
        self._lines.append((line, False))
        self._update()

    def print_epoch(self, line: str) -> None:
        self._lines.append((line, True))
        self._update()

    def show_status(self, text: str) -> None:
        self._status = text
        if not text or time.monotonic() - self._updated >= _UPDATE_SECONDS:
            self._update()

    def track(self, items: Iterable, description: str, total: int) -> Iterator:
        for number, item in enumerate(items):
            self.show_status(f"{description} {number:,}/{total:,}")
            yield item
        self.show_status("")

    def _update(self) -> None:
        from IPython.display import display

        self._updated = time.monotonic()
        content = {"text/plain": self._text()}
        if self._output is None:
            self._output = display(content, raw=True, display_id=True)
        else:
            self._output.update(content, raw=True)

    def _text(self) -> str:
        epochs = [number for number, (_, is_epoch) in enumerate(self._lines) if is_epoch]
        hidden = epochs[:-_EPOCHS_SHOWN]
        lines = []
        for number, (line, _) in enumerate(self._lines):
            if number not in hidden:
                lines.append(line)
            elif number == hidden[-1]:
                lines.append(f"{'':7}({len(hidden)} earlier epochs)")
        return "\n".join([*lines, self._status])


def default_console() -> Console:
    """Returns a `NotebookConsole` in a notebook, and a `Console` elsewhere."""
    return NotebookConsole() if _is_notebook() else Console()


def _is_notebook() -> bool:
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return hasattr(shell, "kernel")


class TrainingDisplay:
    """A progress bar over all steps of a run, and a line for each epoch."""

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
        self._groups = _fitting_columns(console.width)

    def __enter__(self) -> "TrainingDisplay":
        if self._progress is not None:
            self._progress.start()
            self._task = self._progress.add_task(
                "", total=self._epochs * self._steps_per_epoch, rate=""
            )
        return self

    def __exit__(self, *exception: object) -> None:
        self._console.show_status("")
        if self._progress is not None:
            self._progress.stop()

    def start(
        self,
        history: Sequence[Mapping[str, Any]],
        improvements: Container[int],
        first_step: int,
        is_finished: bool = False,
    ) -> None:
        """Prints the table's header, and the epochs that finished before the run was resumed.

        Args:
          history: The records of the finished epochs.
          improvements: The numbers of the epochs that were better than all earlier epochs.
          first_step: The step from which training continues.
          is_finished: Whether all epochs are finished.
        """
        if is_finished:
            self._console.print(f"training is finished already, after step {first_step:,}")
        elif first_step:
            self._console.print(f"continues from step {first_step:,}")
        self._console.print(self._row("", self._titles()))
        self._console.print(self._row("  epoch", self._cells(lambda group, name: name)))
        for record in history:
            self.epoch(record, is_best=record["epoch"] in improvements)

    def step(self, step: int, loss: float, images_per_second: float) -> None:
        """Shows the number of finished steps, the loss of the last step, and the speed."""
        epoch = min(step // self._steps_per_epoch + 1, self._epochs)
        rate = f"loss {loss:.3f}  {images_per_second:,.0f} img/s" if images_per_second else ""
        self._console.show_status(f"epoch {epoch}/{self._epochs}  step {step:,}  {rate}")
        if self._progress is not None:
            self._progress.update(
                self._task,
                completed=step,
                description=f"epoch {epoch}/{self._epochs}",
                rate=rate,
            )

    def epoch(self, record: Mapping[str, Any], *, is_best: bool, note: str = "") -> None:
        """Prints the line of a finished epoch.

        Args:
          record: The record of the epoch.
          is_best: Whether the epoch is the best so far, which is marked.
          note: A text at the end of the line, such as the name of a member.
        """

        def cell(group: str, name: str) -> str:
            value = record[f"{group}_{name.lower()}"] if group else record["images_per_second"]
            form = {"loss": ".3f", "images/s": ",.0f"}.get(name, ".2%")
            return f"{value:{form}}"

        line = self._row(f"{record['epoch']:>4}/{self._epochs}", self._cells(cell))
        self._console.print_epoch(line + f"  {note}" * bool(note) + "  best" * is_best)

    def _row(self, first: str, groups: Sequence[str]) -> str:
        return f"{first:<11} {'   '.join(groups)}".rstrip()

    def _titles(self) -> list[str]:
        widths = [sum(columns.values()) + len(columns) - 1 for columns in self._groups.values()]
        return [
            f" {name} ".center(width, "-") if name else ""
            for name, width in zip(self._groups, widths, strict=True)
        ]

    def _cells(self, cell: Callable[[str, str], str]) -> list[str]:
        return [
            " ".join(f"{cell(group, name):>{width}}" for name, width in columns.items())
            for group, columns in self._groups.items()
        ]


def _fitting_columns(width: int | None) -> dict[str, dict[str, int]]:
    """Returns, by group, the columns of the epoch table that fit into the terminal."""
    groups = {group: dict(columns) for group, columns in _GROUPS.items()}
    for group, name in _OPTIONAL_COLUMNS:
        cells = sum(sum(columns.values()) + len(columns) + 2 for columns in groups.values())
        if width is None or FACT_INDENT - 3 + cells + len("  best") <= width:
            break
        del groups[group][name]
        groups = {group: columns for group, columns in groups.items() if columns}
    return groups
