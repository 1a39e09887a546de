"""The names and hashes of a bundle's files, without the imports that reading its arrays needs."""

import hashlib
import pathlib
from collections.abc import Mapping
from typing import Any


def listed_files(description: Mapping[str, Any]) -> dict[str, str]:
    """Returns the sha256 of each file that the content of a bundle.json lists, by name.

    Raises:
      ValueError: A file is outside the folder.
    """
    files = description["files"]
    for name in files:
        parts = pathlib.PurePosixPath(name)
        if parts.is_absolute() or ".." in parts.parts:
            raise ValueError(f"its files include {name}, which is outside the folder")
    return {name: record["sha256"] for name, record in files.items()}


def file_sha256(path: pathlib.Path) -> str:
    """Returns the sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
