"""Reads images from request bodies: image files, forms (RFC 7578), base64 text and JSON numbers."""

import base64
import binascii
import dataclasses
import io
import math
import re
from typing import Any, cast

import numpy as np
import pydantic_core
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import Field, File, FormParser, parse_options_header

from cnn_jax.serve.limits import Limits, Refused

# Maximum number of empty parts in a form. A browser sends an empty part for a file input without a
# file.
_MAX_EMPTY_PARTS = 32
# The prefix of a data URL, such as "data:image/png;base64," (RFC 2397).
_DATA_URL = re.compile(r"data:[^,]*;base64,", re.IGNORECASE)
_MAX_NAME_CHARACTERS = 200
# Maximum estimated memory of a parsed JSON body, in bytes. The estimate adds a number of bytes for
# each character "," (an element), "[" (a list), "{" (an object) and ":" (a member of an object).
_MAX_PARSED_BYTES = 100_000_000
_PARSED_BYTES = {b",": 64, b"[": 96, b"{": 96, b":": 112}


@dataclasses.dataclass
class Part:
    """An image file of a request."""

    name: str  # The file name that the client sent, or the image's index: "0", "1", ...
    content: bytes


def read_images(body: bytes, content_type: str, limits: Limits) -> list[Part]:
    """Returns the image files in a request's body.

    If the Content-Type header does not name a form, the whole body is a single image file.

    Raises:
      Refused: The body has no image or too many images, or the form is damaged.
    """
    kind, options = parse_options_header(content_type)
    if kind == b"multipart/form-data":
        parts = _parse_form(body, options.get(b"boundary", b""), limits)
    else:
        parts = [Part("0", body)] if body else []
    limits.check_count(len(parts))
    return parts


def _parse_form(body: bytes, boundary: bytes, limits: Limits) -> list[Part]:
    """Parses a form, and returns the files that the form contains.

    Raises:
      Refused: The form is damaged, has too many files, or has a field that is not a file.
    """
    if not 0 < len(boundary) <= 70:
        message = "multipart/form-data needs a boundary of at most 70 characters"
        raise Refused(400, "form", message)
    parts: list[Part] = []
    num_empty, is_complete = 0, False

    def add_file(file: File) -> None:
        nonlocal num_empty
        content = cast(io.BytesIO, file.file_object).getvalue()
        name = (file.file_name or b"").decode("utf-8", "replace")[:_MAX_NAME_CHARACTERS]
        if name or content:
            parts.append(Part(name or str(len(parts)), content))
            limits.check_count(len(parts))
            return
        num_empty += 1
        if num_empty > _MAX_EMPTY_PARTS:
            message = f"a form may have at most {_MAX_EMPTY_PARTS} parts without a file"
            raise Refused(413, "too_many", message)

    def refuse_field(field: Field) -> None:
        # The client may have meant an image or a query parameter.
        name = (field.field_name or b"").decode("utf-8", "replace")[:_MAX_NAME_CHARACTERS]
        raise Refused(
            400,
            "form",
            f"the form's field {name!r} is not a file: it has no file name (with curl: -F "
            f"{name or 'file'}=@FILE); parameters belong to the path, as in /predict?top=3",
        )

    def end() -> None:
        nonlocal is_complete
        is_complete = True

    in_memory = {"MAX_MEMORY_FILE_SIZE": math.inf}
    try:
        parser = FormParser(
            "multipart/form-data", refuse_field, add_file, end, boundary, config=in_memory
        )
        parser.write(body)
        parser.finalize()
    except FormParserError as error:
        raise Refused(400, "form", f"the form is damaged: {error}") from error
    if not is_complete:
        raise Refused(400, "form", "the form is incomplete: its last boundary is missing")
    return parts


def decode_base64(text: object) -> bytes:
    """Decodes base64 text (RFC 4648, sections 4 and 5) to the bytes of an image file.

    Line breaks and indentation, missing or additional padding, and a prefix such as
    `data:image/png;base64,` are accepted.

    Raises:
      Refused: The text is not base64.
    """
    if not isinstance(text, str) or not text.isascii():
        raise Refused(400, "image", "an image in base64 must be a string of ASCII characters")
    try:
        joined = "".join(map(str.strip, text.splitlines()))
        plain = _DATA_URL.sub("", joined, count=1) if joined[:5].lower() == "data:" else joined
        # URL-safe base64 has - and _ instead of + and /, and may omit the padding.
        plain = plain.translate(str.maketrans("-_", "+/")).rstrip("=")
        content = base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise Refused(400, "image", "an image is not in base64") from error
    if not content:
        raise Refused(400, "no_image", "an image is empty")
    return content


def parse_pixels(values: object) -> np.ndarray:
    """Converts nested lists of pixel values to uint8 [height, width, 3] or [height, width].

    Raises:
      Refused: The shape is not the shape of an image, a number is not an integer from 0 to 255, or
        the largest number is 1.
    """
    array = parse_grey_levels(values)
    if array.ndim not in (2, 3) or not array.size:
        raise Refused(400, "image", "an image must be numbers of shape [height, width, 3]")
    if array.ndim == 3 and array.shape[2] not in (1, 3):
        hint = "; put the channels last" if array.shape[0] in (1, 3) else ""
        message = f"an image must have shape [height, width, 3], not {list(array.shape)}{hint}"
        raise Refused(400, "image", message)
    check_range(array)
    return array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array


def parse_grey_levels(values: object) -> np.ndarray:
    """Converts nested lists of pixel values to a uint8 array of the same shape.

    Raises:
      Refused: A number is not an integer from 0 to 255, or the rows differ in length.
    """
    # Check the types before NumPy converts the lists, because every element of a NumPy string array
    # needs as much memory as the longest string.
    if not _are_numbers(values):
        raise Refused(400, "image", "an image must consist of numbers")
    try:
        array = np.asarray(values, np.float64)
    except (ValueError, OverflowError) as error:
        raise Refused(400, "image", "an image's rows differ in length") from error
    # NaN is refused too, because every comparison with NaN is False.
    if not np.all((array >= 0) & (array <= 255)) or np.any(array != np.floor(array)):
        hint = _RANGE_HINT if np.all((array >= 0) & (array <= 1)) else ""
        raise Refused(400, "image", f"an image's numbers must be integers from 0 to 255{hint}")
    return array.astype(np.uint8)


_RANGE_HINT = "; multiply numbers from 0 to 1 by 255, or send an image file in base64"


def check_range(image: np.ndarray) -> None:
    """Refuses an image whose pixel values seem to be fractions from 0 to 1.

    If the values were fractions, 1 would mean white instead of almost black. An image of only
    zeros is accepted, because the image is black in both cases.

    Raises:
      Refused: The largest grey level is 1.
    """
    if image.max(initial=0) == 1:
        raise Refused(
            400, "image", f"an image's numbers are all 0 or 1, and white is 255{_RANGE_HINT}"
        )


def _are_numbers(values: object) -> bool:
    """Returns whether nested lists contain only numbers."""
    if not isinstance(values, list):
        return type(values) in (int, float)
    kinds = set(map(type, values))
    return all(map(_are_numbers, values)) if list in kinds else kinds <= {int, float}


def parse_json(body: bytes) -> dict[str, Any]:
    """Parses a request body that must be a JSON object.

    Raises:
      Refused: The body is not a JSON object, or would take too much memory.
    """
    # Estimate the memory before parsing, because 20 MB of empty lists become 500 MB in memory.
    if sum(body.count(mark) * size for mark, size in _PARSED_BYTES.items()) > _MAX_PARSED_BYTES:
        raise Refused(413, "too_large", "too many values; send image files in base64")
    try:
        fields = pydantic_core.from_json(body)
    except ValueError as error:
        raise Refused(400, "json", f"the body is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise Refused(400, "json", "the body must be a JSON object")
    return fields
