"""Entries that a later version of the package could write into the log of a registry."""

import hashlib
import json
import pathlib

from cnn_jax.registry.ledger import fields_digest


def append_unknown_entry(registry, **changes):
    """Appends an entry to the log whose action only a later version of the package knows."""
    folder = pathlib.Path(registry.url) / "log"
    last = max(folder.iterdir())
    fields = json.loads(last.read_bytes()) | {
        "number": int(last.stem) + 1,
        "previous": hashlib.sha256(last.read_bytes()).hexdigest(),
        "action": "quarantine",
        "skippable": True,
        **changes,
    }
    fields["sha256"] = fields_digest(fields)
    (folder / f"{fields['number']:08d}.json").write_text(json.dumps(fields))
