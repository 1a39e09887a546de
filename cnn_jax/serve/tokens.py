"""Reads access tokens (bearer tokens, RFC 6750) from a file."""

import hashlib
import logging
import pathlib
import time

from cnn_jax.system.errors import ConfigError

logger = logging.getLogger(__name__)

# The words before a token. Servers of earlier versions had an administration API for "admin".
_ROLES = ("predict", "admin")
# Minimum seconds between two checks of whether the file of tokens has changed.
_CHECK_SECONDS = 1.0
_MIN_CHARACTERS = 16


class Tokens:
    """The access tokens in a file; the file is read again when it changes.

    Each line of the file is `predict TOKEN`. Empty lines and lines that begin with # are ignored.
    If a changed file is invalid, the previous tokens stay valid, and the error is logged.
    """

    def __init__(self, path: pathlib.Path):
        """Reads the tokens from a file.

        Raises:
          ConfigError: The file cannot be read, or a line is invalid.
        """
        self._path = path
        # Get the file's modification time, size and inode before `_read`, so that every later
        # change is noticed.
        self._version = _version(path)
        self._digests = _read(path)
        self._checked_at = time.monotonic()

    def allow(self, header: str | None) -> bool:
        """Returns whether an Authorization header (None if it is missing) has a token."""
        self._reload_if_changed()
        scheme, digest = _parse(header)
        # The time of this comparison reveals only a part of a digest, from which no token follows.
        return scheme.lower() == "bearer" and digest in self._digests

    def client(self, header: str | None) -> str:
        """Returns a key of the token in an Authorization header, however the header writes it."""
        return _parse(header)[1].hex()

    def _reload_if_changed(self) -> None:
        if time.monotonic() - self._checked_at < _CHECK_SECONDS:
            return
        self._checked_at = time.monotonic()
        version = _version(self._path)
        if version == self._version:
            return
        self._version = version
        try:
            self._digests = _read(self._path)
        except ConfigError as error:
            logger.error("%s; the previous tokens stay valid", error)


def _version(path: pathlib.Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


def _parse(header: str | None) -> tuple[str, bytes]:
    """Returns the scheme of an Authorization header, and the digest of its token."""
    scheme, _, token = (header or "").partition(" ")
    return scheme, _digest(token.strip())


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()


def _read(path: pathlib.Path) -> frozenset[bytes]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--tokens: cannot read {path}: {error}") from error
    found = set()
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        role, _, token = line.strip().partition(" ")
        token = token.strip()
        is_token = len(token) >= _MIN_CHARACTERS and " " not in token and token.isascii()
        if role not in _ROLES or not is_token:
            raise ConfigError(
                f"--tokens: {path}, line {number}: must be `predict TOKEN`; a token has at least "
                f"{_MIN_CHARACTERS} ASCII characters"
            )
        found.add(_digest(token))
    if not found:
        raise ConfigError(f"--tokens: {path} has no token")
    return frozenset(found)
