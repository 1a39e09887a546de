import base64
import contextlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from requests import PreparedRequest, Request

from cnn_jax.serve.images import decode_base64, parse_json, parse_pixels, read_images
from cnn_jax.serve.limits import Limits, Refused

LIMITS = Limits(images=3)


def form(*files, **fields) -> PreparedRequest:
    """Returns a form request, encoded by `requests`; each file is a pair (name, content)."""
    parts = [("file", (name, content)) for name, content in files]
    return Request("POST", "http://host/", files=parts or None, data=fields).prepare()


def read(request, limits=LIMITS):
    found = read_images(request.body, request.headers["Content-Type"], limits)
    return [(part.name, part.content) for part in found]


def refused(call, *args):
    with pytest.raises(Refused) as caught:
        call(*args)
    return caught.value.status, caught.value.reason


@pytest.mark.parametrize(
    "kind", ["", "image/png", "application/octet-stream", "text/html", "\xff;"]
)
def test_a_body_without_form_is_an_image(kind):
    (part,) = read_images(b"bytes", kind, LIMITS)
    assert (part.name, part.content) == ("0", b"bytes")


def test_an_empty_body_has_no_image():
    assert refused(read_images, b"", "image/png", LIMITS) == (400, "no_image")


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.text("abcäß .-_", min_size=1, max_size=9), st.binary(max_size=200)),
        min_size=1,
        max_size=3,
    )
)
def test_forms_of_another_library_are_read(files):
    assert read(form(*files)) == files


@pytest.mark.parametrize("field", ["other", "file", "top"])
def test_a_field_without_file_is_refused_by_name(field):
    """A form field without a file is refused, because it could be an image or a parameter."""
    with pytest.raises(Refused, match=f"field '{field}' is not a file.*-F {field}=@FILE") as caught:
        read(form(("a.png", b"1"), **{field: "value"}))
    assert (caught.value.status, caught.value.reason) == (400, "form")


def test_unnamed_files_get_an_index():
    body = b""
    for content in (b"1", b"", b"2"):
        body += b'--x\r\nContent-Disposition: form-data; name="file"; filename=""\r\n\r\n'
        body += content + b"\r\n"
    found = read_images(body + b"--x--\r\n", "multipart/form-data; boundary=x", LIMITS)
    assert [(part.name, part.content) for part in found] == [("0", b"1"), ("1", b"2")]


def test_a_form_may_not_have_too_many_files():
    assert refused(read, form(*[("a", b"1")] * 4)) == (413, "too_many")


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"", "multipart/form-data"),
        (b"", "multipart/form-data; boundary="),
        (b"", "multipart/form-data; boundary=" + "x" * 71),
        (b"", "multipart/form-data; boundary=x"),
        (b"nonsense", "multipart/form-data; boundary=x"),
        (
            b"--x\r\nContent-Disposition: form-data; name=f; filename=a\r\n\r\n1",
            "multipart/form-data; boundary=x",
        ),
        (
            b"--x\r\n" + b"a" * 5000 + b": b\r\n\r\n1\r\n--x--\r\n",
            "multipart/form-data; boundary=x",
        ),
        (
            b"--x\r\na: " + b"a" * 5000 + b"\r\n\r\n1\r\n--x--\r\n",
            "multipart/form-data; boundary=x",
        ),
    ],
)
def test_a_damaged_form_is_refused(body, kind):
    assert refused(read_images, body, kind, LIMITS) == (400, "form")


def test_a_form_without_files_has_no_image():
    body = b'--x\r\nContent-Disposition: form-data; name="a"; filename=""\r\n\r\n\r\n--x--\r\n'
    assert refused(read_images, body, "multipart/form-data; boundary=x", LIMITS) == (
        400,
        "no_image",
    )


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300), st.integers(0, 400), st.binary(max_size=3))
def test_any_form_is_read_or_refused(noise, place, other):
    request = form(("a.png", noise), ("b.png", b"12345"))
    damaged = request.body[:place] + other + request.body[place + len(other) :]
    with contextlib.suppress(Refused):
        read_images(damaged, request.headers["Content-Type"], LIMITS)


@given(st.binary(min_size=1, max_size=100))
def test_base64_of_either_alphabet_with_or_without_padding(content):
    for encode in (base64.b64encode, base64.urlsafe_b64encode):
        text = encode(content).decode()
        assert decode_base64(text) == decode_base64(text.rstrip("=")) == decode_base64(f" {text}\n")
        assert decode_base64(text) == content


@given(
    st.binary(min_size=1, max_size=300),
    st.sampled_from(["\n", "\r\n", "\n    "]),
    st.sampled_from(["", "data:image/png;base64,", "DATA:;base64,", "data:a/b;c=d;base64,\n"]),
)
def test_base64_in_lines_and_in_data_urls(content, line_end, prefix):
    """Base64 text with line breaks, with a data-URL prefix, or without padding is decoded."""
    text = base64.encodebytes(content).decode().replace("\n", line_end)
    assert decode_base64(prefix + text) == content
    assert decode_base64(prefix + text.replace("=", "")) == content


@pytest.mark.parametrize(
    "text",
    [
        *(None, 3, ["aa"], "a", "ä", "a b", "!!!!", "\ud800", "aaaaa", "ab==cd=="),
        *("data:image/png,abcd", "data:;base64;abcd", "xdata:;base64,abcd"),
    ],
)
def test_invalid_base64_is_refused(text):
    assert refused(decode_base64, text) == (400, "image")


def test_empty_base64_is_refused():
    for text in ("", "\n", "====", "data:image/png;base64,"):
        assert refused(decode_base64, text) == (400, "no_image")


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 1), (2, 3, 3), (1, 1, 3)])
@pytest.mark.parametrize("kind", [int, float])
def test_an_image_in_numbers(shape, kind):
    array = np.random.default_rng(0).integers(0, 256, shape)
    found = parse_pixels(array.astype(kind).tolist())
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, array[..., 0] if shape[-1] == 1 else array)


@pytest.mark.parametrize(
    "values",
    [
        *(3, None, "text", [], [[]], [[[]]], [1, 2, 3], {"a": 1}, [["a"]], [[None]], [[True]]),
        *([[[1, 2]]], [[[1, 2, 3, 4]]], [[[[1, 2, 3]]]], [[[1, 2, 3]], [[1, 2, 3], [1, 2, 3]]]),
        *([[[0, 0, 256]]], [[[0, 0, -1]]], [[[0, 0, 0.5]]], [[[0, 0, float("nan")]]]),
        *([[[0.0, 1.0, 0.0]]], [[0, 1]], [[[1.0, 0.25, 0]]], [[1, True]], [["1", "2"]]),
        *([[[0, 0, float("inf")]]], [[[0, 0, 10**30]]], [[[0, 0, -(10**400)]]]),
    ],
)
def test_invalid_numbers_are_refused(values):
    assert refused(parse_pixels, values) == (400, "image")


def test_numbers_from_0_to_1_are_refused():
    """In tensorflow/serving#1317, images with only the values 0.0 and 1.0 were read as black."""
    for values in ([[0.0, 1.0]], [[0, 1]], [[0.5, 1.0]], [[0.25, 0.0]]):
        with pytest.raises(Refused, match="multiply numbers from 0 to 1 by 255"):
            parse_pixels(values)
    for values in ([[0.0, 0.0]], [[0, 2]], [[0.0, 255.0]]):
        np.testing.assert_array_equal(parse_pixels(values), values)


def test_channels_first_are_refused_with_a_hint():
    with pytest.raises(Refused, match="put the channels last"):
        parse_pixels(np.full((3, 4, 5), 9).tolist())


def test_only_json_objects_are_accepted():
    assert parse_json(b'{"a": [1, null, "\\u00e4"]}') == {"a": [1, None, "ä"]}
    for body in (
        b"",
        b"{",
        b"[1]",
        b"1",
        b"\xff",
        b'{"a": 1} x',
        b"[" * 100_000,
        b'{"a":' * 100_000,
    ):
        assert refused(parse_json, body) == (400, "json")
