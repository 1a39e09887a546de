import dataclasses
import html.parser
import json
import os
import warnings

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from cnn_jax.data.files import open_folder
from cnn_jax.data.splits import Division
from cnn_jax.data.survey import survey
from cnn_jax.report import inspection, style

HOSTILE = (
    '<script>alert("1")<',
    "new\nline",
    "'quotes\" & $x^$",
    "{{ 7 * 7 }}{% raw %}",
    "😀 猫 \u202egnp",
    os.fsdecode(b"\xff\xfe"),
)


class _Parser(html.parser.HTMLParser):
    """A parser that collects a page's elements, its text, and the files that it refers to."""

    def __init__(self):
        super().__init__()
        self.elements, self.files, self.cells, self.text = [], [], [], ""

    def handle_starttag(self, tag, attrs):
        self.elements.append(tag)
        names = {"src", "srcset", "href"}
        self.files += [value for name, value in attrs if name in names]
        assert not any(name.startswith("on") for name, _ in attrs)

    def handle_data(self, data):
        self.text += data
        if self.elements[-1:] == ["td"]:
            self.cells.append(data)


def _parsed(folder):
    parser = _Parser()
    parser.feed((folder / "index.html").read_text("utf-8"))
    return parser


def _image(seed, size=(12, 8)):
    noise = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return Image.fromarray(noise).resize(size)


@pytest.fixture
def hostile_folder(tmp_path):
    """A folder with one class for each name in HOSTILE, such as HTML code and line breaks.

    In each class, the names of two files also contain the name of the class.
    """
    root = tmp_path / "data"
    for number, name in enumerate(HOSTILE):
        (root / name).mkdir(parents=True)
        for i in range(4):
            _image(10 * number + i, (8 + i, 9)).save(root / name / f"{i}.png")
        _image(10 * number, (8, 9)).save(root / name / f"{name}.png")
        (root / name / f"bad {name}.jpg").write_bytes(b"nothing")
    return root


def _written(root, folder, **options):
    folder.mkdir()
    with warnings.catch_warnings():
        # Matplotlib warns, for example, about a character that a font lacks.
        warnings.simplefilter("error")
        inspection.write_page(survey(open_folder(root), Division(), **options), folder)
    return _parsed(folder)


def test_hostile_names_are_escaped(hostile_folder, tmp_path):
    page = _written(hostile_folder, tmp_path / "page")
    assert not {"script", "iframe", "object", "svg", "b"} & set(page.elements)
    for shown in (
        '<script>alert("1")<',
        r"new\nline",
        "'quotes\" & $x^$",
        "{{ 7 * 7 }}{% raw %}",
        r"😀 猫 \u202egnp",
        r"\udcff\udcfe",
    ):
        assert f"{shown}/{shown}.png" in page.text
        assert f"{shown}/bad {shown}.jpg" in page.text
        # Only the table of classes has a cell that contains nothing but the class name.
        assert page.cells.count(shown) == 1


def test_all_files_named_on_page_exist(hostile_folder, tmp_path):
    page = _written(hostile_folder, tmp_path / "page")
    written = {path.name for path in (tmp_path / "page").iterdir()}
    assert set(page.files) <= written
    assert written - set(page.files) == {"index.html"}
    assert {f"class_{label:03d}.png" for label in range(6)} < written
    assert all(name.isascii() and "/" not in name for name in written)
    for name in written:
        if name.endswith(".png"):
            Image.open(tmp_path / "page" / name).load()


def test_json_has_complete_lists(tmp_path):
    root = tmp_path / "data"
    for name in ("a", "b"):
        (root / name).mkdir(parents=True)
        for i in range(60):
            _image(i).save(root / name / f"{i:02d}.png")
        (root / name / "bad.png").write_bytes(b"")
    page = _written(root, tmp_path / "page")
    assert "and 10 more" in page.text
    # Each of the first 50 sets of duplicates has a picture of its two equal images, side by side.
    pictures = sorted((tmp_path / "page").glob("exact_*.png"))
    assert {path.name for path in pictures} < set(page.files)
    assert len(pictures) == 50
    pixels = np.asarray(Image.open(pictures[0]))
    assert pixels.shape == (96, 2 * 96 + 6, 4)
    np.testing.assert_array_equal(pixels[:, :96], pixels[:, -96:])
    assert pixels[..., 3].any()
    found = json.loads((tmp_path / "page" / "inspection.json").read_text())
    assert len(found["exact_duplicates"]) == 60
    assert found == survey(open_folder(root), Division()).to_dict()


def test_page_is_reproducible(image_folder, tmp_path):
    contents = []
    for name in ("first", "second"):
        _written(image_folder, tmp_path / name)
        paths = sorted((tmp_path / name).iterdir())
        contents.append([(path.name, path.read_bytes()) for path in paths])
    assert contents[0] == contents[1]


def test_page_without_readable_images_is_written(tmp_path):
    root = tmp_path / "data"
    for name in ("a", "b"):
        (root / name).mkdir(parents=True)
        (root / name / "x.png").write_bytes(b"nothing")
    page = _written(root, tmp_path / "page")
    assert "a/x.png" in page.text
    assert "is not an image of a known format" in page.text


def test_contact_sheet_keeps_shapes_and_choice_of_images(tmp_path):
    root = tmp_path / "data"
    for name, size in (("tall", (2, 400)), ("wide", (300, 100))):
        (root / name).mkdir(parents=True)
        for i in range(30):
            _image(i, size).save(root / name / f"{i}.png")
    found = survey(open_folder(root), Division())
    chosen = {found.source.ids[i] for i in inspection.sample(found, 1)}
    assert len(chosen) == 24
    spare = next(i for i in found.source.ids if i.startswith("wide") and i not in chosen)
    (root / spare).unlink()
    fewer = survey(open_folder(root), Division())
    assert {fewer.source.ids[i] for i in inspection.sample(fewer, 1)} == chosen

    (tmp_path / "page").mkdir()
    inspection.write_page(found, tmp_path / "page")
    sheet = np.asarray(Image.open(tmp_path / "page" / "class_001.png"))
    assert sheet.shape == (4 * 96 + 3 * 6, 6 * 96 + 5 * 6, 4)
    rows = np.flatnonzero(sheet[:96, :96, 3].any(axis=1))
    # The image is scaled to 96 x 32 pixels and centred in its square.
    assert (rows.min(), rows.max()) == (32, 63)


def test_missing_image_leaves_an_empty_square(image_folder, tmp_path):
    root = tmp_path / "data"
    for name in ("a", "b"):
        (root / name).mkdir(parents=True)
        _image(0).save(root / name / "x.png")
    found = survey(open_folder(root), Division())
    (root / "a" / "x.png").unlink()
    (tmp_path / "page").mkdir()
    inspection.write_page(found, tmp_path / "page")
    assert not np.asarray(Image.open(tmp_path / "page" / "class_000.png")).any()


def test_table_of_many_classes_shows_largest_and_smallest():
    counts = np.arange(3000).reshape(1000, 3)
    rows = inspection.class_rows(counts)
    assert len(rows) == 201
    assert rows[100] is None
    assert [rows[0]["label"], rows[99]["label"], rows[101]["label"]] == [999, 900, 99]
    assert rows[0]["images"] == [2997, 2998, 2999]
    assert sum(rows[0]["percents"]) == pytest.approx(100)
    assert sum(rows[-1]["percents"]) == pytest.approx(100 * 3 / (2997 + 2998 + 2999))


@pytest.mark.parametrize("max_points", [0, 2000])
def test_very_different_sizes_have_a_chart(max_points, monkeypatch, tmp_path):
    monkeypatch.setattr(inspection, "_MAX_POINTS", max_points)
    root = tmp_path / "data"
    for name in ("a", "b"):
        (root / name).mkdir(parents=True)
        for i, size in enumerate([(1, 1), (1, 300), (200, 7)]):
            _image(i, size).save(root / name / f"{i}.png")
    page = _written(root, tmp_path / "page")
    assert {"resolutions.png", "resolutions_dark.png", "aspect_ratios.png"} <= set(page.files)


def test_grey_level_ticks_are_evenly_spaced_as_printed(image_folder):
    found = survey(open_folder(image_folder), Division())
    found = dataclasses.replace(found, levels=np.ones((3, 256), int))
    figure = Figure()
    inspection._plot_levels(found, figure, style.THEMES[0])
    axis = figure.axes[0].yaxis
    printed = [float(axis.get_major_formatter()(tick, 0)) for tick in axis.get_majorticklocs()]
    assert np.ptp(np.diff(printed)) == pytest.approx(0, abs=1e-9)
