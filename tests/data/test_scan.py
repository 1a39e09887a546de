import dataclasses
import hashlib

import numpy as np
import pytest
from PIL import Image

from cnn_jax.data import decode, scan
from cnn_jax.data.files import open_folder
from cnn_jax.data.preprocessing import Preprocessing

SMALL = Preprocessing(image_size=(8, 8))


class _Sink:
    def __init__(self):
        self.rows = {}

    def needs(self, digest):
        return True

    def write(self, row, digest, pixels):
        self.rows[row] = pixels

    def store(self):
        pass


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("a/1.png", "a/2.bmp", "b/3.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (9, 7, 3), np.uint8)).save(tmp_path / name)
    (tmp_path / "b" / "4.jpg").write_bytes(b"no image")
    return tmp_path


def test_a_record_says_what_is_in_an_image(folder):
    records = scan.scan(open_folder(folder), SMALL)
    assert [record.error is None for record in records] == [True, True, True, False]
    assert records[3].error == "is not an image of a known format"
    encoded = (folder / "a" / "1.png").read_bytes()
    assert records[0].digest == hashlib.sha256(encoded).hexdigest()[:32]
    assert records[0].header == decode.Header("PNG", "RGB", 7, 9, 1)


def test_equal_pixels_have_equal_digests_whatever_the_file(folder):
    image = Image.open(folder / "a" / "1.png")
    image.save(folder / "b" / "same.bmp")
    image.transpose(Image.Transpose.ROTATE_90).save(folder / "b" / "turned.png")
    records = scan.scan(open_folder(folder), SMALL)
    by_id = dict(zip(open_folder(folder).ids, records, strict=True))
    assert by_id["b/same.bmp"].pixels == by_id["a/1.png"].pixels
    assert by_id["b/same.bmp"].digest != by_id["a/1.png"].digest
    # The copy has the same digest of the pixels as the original, so it adds no new value.
    assert len({record.pixels for record in records}) == 5


def test_pixels_of_another_shape_are_not_equal():
    black = [Image.new("RGB", size) for size in ((4, 6), (6, 4))]
    digests = set()
    for image in black:
        encoded = image.tobytes("raw")
        assert len(encoded) == 72
        digests.add(scan.examine(_png(image), SMALL)[0].pixels)
    assert len(digests) == 2


def _png(image):
    import io

    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def test_the_sink_gets_the_images_of_load(folder):
    source, sink = open_folder(folder), _Sink()
    scan.scan(source, SMALL, sink)
    assert sorted(sink.rows) == [0, 1, 2]
    for row, pixels in sink.rows.items():
        np.testing.assert_array_equal(pixels, decode.load(source.read(source.keys[row]), SMALL))


def test_images_with_a_record_are_not_decoded_again(folder, monkeypatch):
    first = scan.scan(open_folder(folder), SMALL)
    examined = []
    original = scan.examine
    monkeypatch.setattr(scan, "examine", lambda *a: examined.append(a) or original(*a))
    assert scan.scan(open_folder(folder), SMALL) == first
    assert examined == []

    Image.new("RGB", (3, 3)).save(folder / "a" / "1.png")
    Image.new("RGB", (3, 4)).save(folder / "a" / "new.png")
    source = open_folder(folder)
    again = dict(zip(source.ids, scan.scan(source, SMALL), strict=True))
    assert len(examined) == 2
    assert again["a/1.png"].header.width == 3
    assert again["b/3.png"] == first[2]


def test_another_pixel_limit_has_its_own_records(folder):
    scan.scan(open_folder(folder), SMALL)
    strict = dataclasses.replace(SMALL, max_pixels=10)
    errors = [record.error for record in scan.scan(open_folder(folder), strict)]
    assert errors[0] == "has 7 x 9 pixels, more than max_pixels = 10"


def test_files_that_could_not_be_read_are_tried_again(folder, monkeypatch):
    source = open_folder(folder)
    (folder / "a" / "1.png").rename(folder / "aside")
    assert scan.scan(source, SMALL)[0].error == "cannot be read: No such file or directory"
    (folder / "aside").rename(folder / "a" / "1.png")
    assert scan.scan(source, SMALL)[0].error is None


def test_a_file_that_is_far_too_large_is_not_read(folder):
    with (folder / "a" / "huge.jpg").open("wb") as file:
        file.truncate(10**12)
    source = open_folder(folder)
    records = dict(zip(source.ids, scan.scan(source, SMALL), strict=True))
    assert "has 1,000,000,000,000 bytes, more than an image" in records["a/huge.jpg"].error


def test_damaged_records_are_ignored(folder, cache_folder):
    first = scan.scan(open_folder(folder), SMALL)
    for damage in ("{broken", "[]", "1", '{"a/1.png": 5, "a/2.bmp": ["x"]}', "null"):
        for path in (cache_folder / "scans").iterdir():
            path.write_text(damage)
        assert scan.scan(open_folder(folder), SMALL) == first


def test_an_interrupted_scan_keeps_the_records_of_a_finished_one(folder):
    source = open_folder(folder)
    finished = scan.scan(source, SMALL)

    def interrupt(finished, *_):
        raise KeyboardInterrupt
        yield

    # This scan began before the other one had stored its records.
    with pytest.raises(KeyboardInterrupt):
        scan.scan(source, SMALL, track=interrupt, known=[None] * len(source))
    assert scan.known_records(source, SMALL) == finished


def test_records_that_cannot_be_stored_only_cause_a_warning(folder, monkeypatch, caplog):
    monkeypatch.setenv("CNN_JAX_CACHE", "/proc/none")
    assert len(scan.scan(open_folder(folder), SMALL)) == 4
    assert "cannot be cached" in caplog.text


def test_a_sink_gets_only_what_it_needs(folder, monkeypatch):
    records = scan.scan(open_folder(folder), SMALL)
    sink, decoded = _Sink(), []
    monkeypatch.setattr(sink, "needs", lambda digest: digest == records[1].digest)
    original = decode.decode
    monkeypatch.setattr(decode, "decode", lambda *a: decoded.append(a) or original(*a))
    assert scan.scan(open_folder(folder), SMALL, sink) == records
    assert list(sink.rows) == [1]
    assert len(decoded) == 1


def _write_floats(folder):
    for i, name in enumerate(("a/1.tif", "a/2.tif", "b/3.tif")):
        (folder / name).parent.mkdir(exist_ok=True)
        values = np.linspace(0, (i + 1) / 3, 12, dtype=np.float32).reshape(3, 4)
        Image.fromarray(values).save(folder / name)


def test_records_have_the_values_of_the_file(folder, tmp_path_factory):
    floats = tmp_path_factory.mktemp("floats")
    _write_floats(floats)
    record = scan.scan(open_folder(folder), SMALL)[0]
    pixels = np.asarray(Image.open(folder / "a" / "1.png"))
    assert record.values == decode.Values("8-bit", int(pixels.min()), int(pixels.max()), 255)
    unknown = dict(
        zip(open_folder(floats).ids, scan.scan(open_folder(floats), SMALL), strict=True)
    )["b/3.tif"]
    assert unknown.values == decode.Values("float", 0, 1, 0)
    assert "--config.data.white_level=1, or" in unknown.error
    # The cache keeps the records of both readable and unreadable images.
    assert record in scan.known_records(open_folder(folder), SMALL)
    assert unknown in scan.known_records(open_folder(floats), SMALL)


def test_the_pixels_key_depends_on_how_images_are_resized(folder):
    options = [
        SMALL,
        dataclasses.replace(SMALL, resize="pad"),
        dataclasses.replace(SMALL, resize="crop"),
        dataclasses.replace(SMALL, resize="crop", crop_ratio=0.5),
        dataclasses.replace(SMALL, interpolation="bicubic"),
        Preprocessing(image_size=(8, 9)),
    ]
    assert len({scan.pixels_key(preprocessing) for preprocessing in options}) == 6
    for preprocessing in options:
        sink, source = _Sink(), open_folder(folder)
        scan.scan(source, preprocessing, sink)
        for row, pixels in sink.rows.items():
            expected = decode.load(source.read(source.keys[row]), preprocessing)
            np.testing.assert_array_equal(pixels, expected)


def test_another_white_level_has_its_own_records(tmp_path):
    _write_floats(tmp_path)
    refused = scan.scan(open_folder(tmp_path), SMALL)
    assert all(record.header is None for record in refused)
    keys = set()
    for white_level in (1.0, 0.5, 1.0):
        preprocessing = dataclasses.replace(SMALL, white_level=white_level)
        source, sink = open_folder(tmp_path), _Sink()
        scan.scan(source, preprocessing, sink)
        assert sorted(sink.rows) == [0, 1, 2]
        for row, pixels in sink.rows.items():
            expected = decode.load(source.read(source.keys[row]), preprocessing)
            np.testing.assert_array_equal(pixels, expected)
        keys.add(scan.pixels_key(preprocessing))
    assert len(keys) == 2
