"""Chooses logged images that are worth a label, and stores labels in the request log.

    cnn_jax label --registry=DIR --model=NAME --log=LOG [LOG ...] --page=label.html
        [--count=100]
    cnn_jax label --log=LOG [LOG ...] --labels=labels.csv

The first command writes a page with images of one version: a random part, which gives an unbiased
accuracy, the images with the least confident predictions, and the most unusual images. Open the
page in a browser, label the images with the keyboard, and save the file labels.csv. The second
command stores these labels. Programs can write the file too: its columns are request_id,
image_index, label and new_class.
"""

import pathlib
import time
from collections import Counter
from collections.abc import Sequence

import numpy as np

from cnn_jax.data.findings import count
from cnn_jax.data.request_log import find_images, read_images
from cnn_jax.monitor.flags import add_log_flags, add_version_flags, open_rows, open_version
from cnn_jax.monitor.labels import (
    REASONS,
    add_labels,
    choose,
    read_labels,
    write_label_page,
)
from cnn_jax.system import cli
from cnn_jax.system.errors import ConfigError, DataError, printable


def main(argv: Sequence[str]) -> None:
    parser = cli.Parser(
        prog="cnn_jax label", description="Label images of a request log, or store their labels."
    )
    add_version_flags(parser)
    add_log_flags(parser)
    parser.add_argument("--page", type=cli.path, metavar="FILE", help="HTML page to write")
    parser.add_argument(
        "--count", type=cli.positive, default=100, metavar="N", help="images on the page (100)"
    )
    parser.add_argument(
        "--random",
        type=cli.fraction,
        default=0.5,
        metavar="RATIO",
        help="fraction of images to choose at random, 0 to 1 (0.5)",
    )
    parser.add_argument("--labels", type=cli.path, metavar="FILE", help="CSV file of labels")
    flags = parser.parse_args(argv)
    if not flags.log:
        raise ConfigError("--log must be given")
    if (flags.page is None) == (flags.labels is None):
        raise ConfigError("either --page or --labels must be given")
    if flags.labels is not None:
        stored = add_labels(flags.log, read_labels(pathlib.Path(flags.labels)))
        print(f"stored {stored:,} labels in {printable(', '.join(flags.log))}")
        return

    served = open_version(flags)
    rows = open_rows(flags, served)
    since = float(rows.times[0]) - 1 if len(rows) else time.time()
    logged = find_images(flags.log, since)
    has_image = np.array([key in logged for key in rows.keys], bool)
    is_unlabelled = rows.labels < 0
    is_free = is_unlabelled & has_image
    chosen = choose(rows, is_free, served.reference, flags.count, flags.random)
    images = read_images(flags.log, [rows.keys[row] for row, _ in chosen])
    items = [
        {"key": rows.keys[row], "reason": reason, "image": images[rows.keys[row]]}
        for row, reason in chosen
        if rows.keys[row] in images
    ]
    if not items:
        advice = "start the server with --request_log_images"
        if not is_unlabelled.any():
            advice = "all have labels"
        raise DataError(f"{', '.join(flags.log)}: no image can be labelled; {advice}")
    title = f"Images of {printable(served.name)} to label"
    write_label_page(pathlib.Path(flags.page), items, rows.class_names, title)
    counts = Counter(item["reason"] for item in items)
    parts = ", ".join(f"{counts[reason]} {reason}" for reason in REASONS if counts[reason])
    print(f"wrote {printable(flags.page)}: {parts}")
    if missing := int((is_unlabelled & ~has_image).sum()):
        print(
            f"{count(missing, 'image')} cannot be labelled, because the log has no pixels of them; "
            "so the random images may be too few for the accuracy that cnn_jax monitor shows"
        )


if __name__ == "__main__":
    cli.run(main)
