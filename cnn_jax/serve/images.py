"""From a request's body to images: a file's bytes, or many in multipart/form-data (RFC 7578)."""

import base64
import binascii
import dataclasses
import re
from typing import Any

import numpy as np
import pydantic_core
from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header

from cnn_jax.serve.limits import Limits, Refused

# Inputs of a page in which no file was chosen.
_MOST_EMPTY = 32
# How an image begins in a page's source (RFC 2397).
_DATA_URL = re.compile(r"data:[^,]*;base64,", re.IGNORECASE)
# Of the headers of a part.
_MOST_HEADER_BYTES = 4_096
_MOST_NAME = 200
# What a body may become in memory when it is parsed, and about what its characters become:
# an element, a list or an object, a member of an object.
_MOST_PARSED_BYTES = 100_000_000
_PARSED_BYTES = {b",": 64, b"[": 96, b"{": 96, b":": 112}


@dataclasses.dataclass
class Part:
    """A file of a form.

    Attributes:
      name: That the client gives it, or its place, 0, 1, ...
      content: Its bytes.
    """

    name: str
    content: bytes


def images_of(body: bytes, content_type: str, limits: Limits) -> list[Part]:
    """The images of a request's body.

    Args:
      body: All of it.
      content_type: The header, "" if there is none. Of a body that is no form, what the bytes
        are is found out from themselves.
      limits: Of the request.

    Raises:
      Refused: There is none, there are too many, or the form is damaged.
    """
    kind, options = parse_options_header(content_type)
    if kind == b"multipart/form-data":
        parts = _parse_form(body, options.get(b"boundary", b""), limits.images)
    else:
        parts = [Part("0", body)] if body else []
    if not parts:
        raise Refused(400, "no_image", "there is no image in the request")
    return parts


def _parse_form(body: bytes, boundary: bytes, most: int) -> list[Part]:
    """The files of a form.

    Raises:
      Refused: The form is damaged, has too many files, or a field that is no file.
    """
    form = _Form(most)
    if not 0 < len(boundary) <= 70:
        raise Refused(400, "form", "multipart/form-data has no boundary, or one that is too long")
    try:
        parser = MultipartParser(boundary, form.callbacks())  # type: ignore[arg-type]
        parser.write(body)
        parser.finalize()
    except MultipartParseError as error:
        raise Refused(400, "form", f"the form is damaged: {error}") from error
    if not form.is_complete:
        raise Refused(400, "form", "the form is cut off before its end")
    return form.parts


class _Form:
    """Collects the files that a parser comes upon."""

    def __init__(self, most: int):
        self.parts: list[Part] = []
        self._count = 0
        self.is_complete = False
        self._most = most
        self._content: list[bytes] = []
        self._header: dict[str, bytes] = {}
        self._field, self._value = b"", b""

    def callbacks(self) -> dict[str, Any]:
        names = ("part_begin", "part_data", "part_end", "header_field", "header_value")
        return {f"on_{name}": getattr(self, f"_{name}") for name in (*names, "header_end", "end")}

    def _part_begin(self) -> None:
        self._count += 1
        if self._count > self._most + _MOST_EMPTY:
            raise Refused(413, "too_many", "the form has too many fields")
        self._content, self._header = [], {}

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._field = self._checked(self._field + data[start:end])

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value = self._checked(self._value + data[start:end])

    def _checked(self, header: bytes) -> bytes:
        if len(header) > _MOST_HEADER_BYTES:
            raise Refused(400, "form", "a header of a part is too long")
        return header

    def _header_end(self) -> None:
        self._header[self._field.lower().decode("latin-1")] = self._value
        self._field, self._value = b"", b""

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        self._content.append(data[start:end])

    def _part_end(self) -> None:
        _, options = parse_options_header(self._header.get("content-disposition", b""))
        name = options.get(b"filename")
        content = b"".join(self._content)
        self._content = []
        if name is None:
            # Not ignored: it may be an image, or a parameter that belongs elsewhere.
            field = options.get(b"name", b"").decode("utf-8", "replace")[:_MOST_NAME]
            raise Refused(
                400,
                "form",
                f"the form's field {field!r} is no file: it has no file name (with curl: -F "
                f"{field or 'file'}=@FILE); parameters stand behind the path, as in /predict?top=3",
            )
        if not name and not content:
            return  # A browser's field in which no file was chosen.
        if len(self.parts) == self._most:
            raise Refused(413, "too_many", f"a request may have {self._most} images")
        name = name.decode("utf-8", "replace")[:_MOST_NAME] or str(len(self.parts))
        self.parts.append(Part(name, content))

    def _end(self) -> None:
        self.is_complete = True


def from_base64(text: object) -> bytes:
    """The bytes of an image file in base64 (RFC 4648, section 4 or 5).

    Taken as well: line breaks and the indentation around them, missing or surplus padding,
    and `data:image/png;base64,` in front.

    Raises:
      Refused: It is not base64.
    """
    if not isinstance(text, str) or not text.isascii():
        raise Refused(400, "image", "an image in base64 must be a string of its letters")
    try:
        joined = "".join(map(str.strip, text.splitlines()))
        plain = _DATA_URL.sub("", joined, count=1) if joined[:5].lower() == "data:" else joined
        # URL-safe base64 uses two other letters, and may omit the padding.
        plain = plain.translate(str.maketrans("-_", "+/")).rstrip("=")
        content = base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise Refused(400, "image", "an image is not in base64") from error
    if not content:
        raise Refused(400, "no_image", "an image is empty")
    return content


def from_numbers(values: object) -> np.ndarray:
    """An image in nested lists of grey levels, as uint8 [height, width, 3] or [height, width].

    Raises:
      Refused: It is not an image: of another shape, or not whole numbers from 0 to 255, or
        all of them are 0 or 1.
    """
    array = grey_levels(values)
    if array.ndim not in (2, 3) or not array.size:
        raise Refused(400, "image", "an image must be numbers [height, width, 3]")
    if array.ndim == 3 and array.shape[2] not in (1, 3):
        hint = "; the channels come last" if array.shape[0] in (1, 3) else ""
        raise Refused(
            400, "image", f"an image must be [height, width, 3], not {list(array.shape)}{hint}"
        )
    check_range(array)
    return array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array


def grey_levels(values: object) -> np.ndarray:
    """Nested lists of grey levels as an array of their shape, uint8.

    Raises:
      Refused: They are not whole numbers from 0 to 255, or their rows differ in length.
    """
    # First of all: an array of strings has room for the longest one in each of its places.
    if not _are_numbers(values):
        raise Refused(400, "image", "an image must be numbers")
    try:
        array = np.asarray(values, np.float64)
    except (ValueError, OverflowError) as error:
        raise Refused(400, "image", "an image's rows differ in length") from error
    # NaN fails the first comparison.
    if not np.all((array >= 0) & (array <= 255)) or np.any(array != np.floor(array)):
        hint = _RANGE_HINT if np.all((array >= 0) & (array <= 1)) else ""
        raise Refused(400, "image", f"an image's numbers must be whole, from 0 to 255{hint}")
    return array.astype(np.uint8)


_RANGE_HINT = "; multiply numbers from 0 to 1 by 255, or send an image file in base64"


def check_range(image: np.ndarray) -> None:
    """Refuses an image whose grey levels may be meant as 0 for black and 1 for white.

    Read as levels from 0 to 255, such an image would be black. An image of zeros only is
    black either way, and is not refused.

    Raises:
      Refused: The largest level is 1.
    """
    if image.max(initial=0) == 1:
        raise Refused(
            400, "image", f"an image's numbers are all 0 or 1, and white is 255{_RANGE_HINT}"
        )


def _are_numbers(values: object) -> bool:
    """Whether there is nothing but numbers in nested lists."""
    if not isinstance(values, list):
        return type(values) in (int, float)
    kinds = set(map(type, values))
    return all(map(_are_numbers, values)) if list in kinds else kinds <= {int, float}


def parse_json(body: bytes) -> dict[str, Any]:
    """A body that is a JSON object.

    Raises:
      Refused: It is not, or it would take too much memory.
    """
    # Before it is parsed: 20 MB of empty lists become half a gigabyte.
    if sum(body.count(mark) * size for mark, size in _PARSED_BYTES.items()) > _MOST_PARSED_BYTES:
        raise Refused(413, "too_large", "too many values; send image files, in base64")
    try:
        found = pydantic_core.from_json(body)
    except ValueError as error:
        raise Refused(400, "json", f"the body is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise Refused(400, "json", "the body must be a JSON object")
    return found
