"""Who may do what: bearer tokens (RFC 6750) from a file."""

import hashlib
import hmac
import logging
import pathlib
import time

from cnn_jax.system.errors import ConfigError

logger = logging.getLogger(__name__)

# What a token may be for. An administrator may also predict.
ROLES = ("predict", "admin")
# Seconds between two looks at the file.
_LOOK_AGAIN = 1.0
_SHORTEST = 16


class Tokens:
    """The tokens of a file, read again when it changes; those that were there stay if it is wrong.

    A line is `predict TOKEN` or `admin TOKEN`; empty lines and those that begin with # are
    left out.
    """

    def __init__(self, path: pathlib.Path):
        """Reads the file.

        Raises:
          ConfigError: It cannot be read, or a line is wrong.
        """
        self._path = path
        self._version = _version(path)  # Before it is read: what changes later is seen later.
        self._digests = _read(path)
        self._looked = time.monotonic()
        # Why the file, as it is now, was not taken.
        self.problem = ""

    def allow(self, header: str | None, role: str) -> bool | None:
        """Whether a request's Authorization header allows a role; None if it is no token here."""
        self._look_again()
        scheme, _, token = (header or "").partition(" ")
        digest = _digest(token.strip())
        found = set()
        # All of them, whichever it is: the time says nothing of what it resembles.
        for other_role, other in self._digests:
            if hmac.compare_digest(digest, other):
                found.add(other_role)
        if scheme.lower() != "bearer" or not found:
            return None
        return role in found or "admin" in found

    def _look_again(self) -> None:
        if time.monotonic() - self._looked < _LOOK_AGAIN:
            return
        self._looked = time.monotonic()
        version = _version(self._path)
        if version == self._version:
            return
        self._version = version
        try:
            self._digests, self.problem = _read(self._path), ""
        except ConfigError as error:
            self.problem = str(error)
            logger.error("%s; the tokens that were there stay", error)


def _version(path: pathlib.Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


def _digest(token: str) -> bytes:
    # Of one length for all, as a comparison in constant time needs.
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()


def _read(path: pathlib.Path) -> list[tuple[str, bytes]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--tokens: cannot read {path}: {error}") from error
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        role, _, token = line.strip().partition(" ")
        token = token.strip()
        if role not in ROLES or len(token) < _SHORTEST or " " in token or not token.isascii():
            raise ConfigError(
                f"--tokens: {path}, line {number}: must be `predict TOKEN` or `admin TOKEN`, the "
                f"token of {_SHORTEST} characters or more"
            )
        found.append((role, _digest(token)))
    if not found:
        raise ConfigError(f"--tokens: {path} has no token")
    return found
