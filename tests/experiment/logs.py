"""Request logs that tests write without a server."""

import datetime
import pathlib

from cnn_jax.data import request_log as files
from cnn_jax.registry.split import Experiment

START = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC).timestamp()
DAY = 86400.0


def experiment(**changes):
    values = {
        "name": "blue",
        "salt": "salt",
        "fraction": 0.5,
        "outcome": "reward",
        "window": DAY,
        "is_shadow": False,
        "model": "flowers",
        "alias": "champion",
        "champion": 1,
        "challenger": 2,
        "start": "2026-01-01T00:00:00+00:00",
    }
    return Experiment(**(values | changes))


class Log:
    """A request log, whose rows are written at `write`; times are in seconds after `START`."""

    def __init__(self, folder: pathlib.Path, running: Experiment):
        self.folder = folder
        self.running = running
        files.make_folders(folder)
        self._rows = {"requests": [], "feedback": [], "failures": []}

    def request(self, unit, time, **changes):
        """Adds an image that the arm of a unit answered; returns the id of the request."""
        arm = self.running.arm(unit or "none")
        row = dict.fromkeys(files.REQUESTS.names) | {
            "time": round(1e6 * (START + time)),
            "request_id": f"{len(self._rows['requests']):032x}",
            "image_index": 0,
            "unit": unit,
            "arm": self.running.column(arm),
            "model": "flowers",
            "version": self.running.versions[arm],
            "digest": "digest",
            "class": "rose",
            "milliseconds": 5.0,
        }
        self._rows["requests"].append(row | changes)
        return (row | changes)["request_id"]

    def feedback(self, request_id, time, label=None, reward=None, image_index=0):
        self._rows["feedback"].append(
            {
                "time": round(1e6 * (START + time)),
                "request_id": request_id,
                "image_index": image_index,
                "label": label,
                "reward": reward,
            }
        )

    def failure(self, unit, time):
        self._rows["failures"].append(
            {
                "time": round(1e6 * (START + time)),
                "request_id": "f" * 32,
                "unit": unit,
                "arm": self.running.column(self.running.arm(unit)),
                "model": "flowers",
                "reason": "late",
            }
        )

    def write(self):
        schemas = {
            "requests": files.REQUESTS,
            "feedback": files.FEEDBACK,
            "failures": files.FAILURES,
        }
        for name, rows in self._rows.items():
            if rows:
                schema = schemas[name]
                columns = {key: [row[key] for row in rows] for key in schema.names}
                segments = files.Segments(self.folder / name, schema)
                segments.append(columns)
                segments.close()
        return self
