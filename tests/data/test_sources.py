import io
import pathlib

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from cnn_jax.data import decode
from cnn_jax.data.sources import (
    DecodedSource,
    FolderSource,
    fingerprint,
    load_image,
    open_source,
)
from cnn_jax.errors import ConfigError, DataError
from cnn_jax.preprocessing import Preprocessing

SMALL = Preprocessing(image_size=(8, 8))


def _picture(path: pathlib.Path, level: int = 0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), (level,) * 3).save(path)


def test_a_folder_has_its_sub_folders_as_classes(tmp_path):
    _picture(tmp_path / "dog" / "b.PNG")
    _picture(tmp_path / "dog" / "deep" / "er" / "a.jpg")
    _picture(tmp_path / "cat" / "ü 猫.png", 200)
    _picture(tmp_path / ".hidden" / "x.png")
    _picture(tmp_path / "dog" / ".thumbnails" / "x.png")
    (tmp_path / "dog" / "notes.txt").write_text("no image")
    (tmp_path / "README").write_text("no class")

    source = open_source(f"folder:{tmp_path}")
    assert source.class_names == ["cat", "dog"]
    assert source.ids == ["cat/ü 猫.png", "dog/b.PNG", "dog/deep/er/a.jpg"]
    np.testing.assert_array_equal(source.labels, [0, 1, 1])
    assert source.num_ignored == 2
    example = source[0]
    assert example["label"] == 0
    assert example["id"] == "cat/ü 猫.png"
    np.testing.assert_array_equal(decode.decode(example["image"]), np.full((4, 4, 3), 200))


def test_folders_that_are_no_classes_are_explained(tmp_path):
    with pytest.raises(DataError, match="there is no folder"):
        FolderSource(tmp_path / "nowhere")
    _picture(tmp_path / "cat" / "a.png")
    with pytest.raises(DataError, match="and has 1"):
        FolderSource(tmp_path)
    (tmp_path / "dog").mkdir()
    with pytest.raises(DataError, match="dog has no images; add some or remove it"):
        FolderSource(tmp_path)


def test_an_unreadable_image_is_named(tmp_path):
    _picture(tmp_path / "cat" / "a.png")
    (tmp_path / "dog").mkdir()
    (tmp_path / "dog" / "broken.jpg").write_bytes(b"not a picture")
    source = FolderSource(tmp_path)
    with pytest.raises(DataError, match=r"dog/broken\.jpg is not an image"):
        DecodedSource(source, SMALL)
    (tmp_path / "cat" / "a.png").unlink()
    with pytest.raises(DataError, match=r"a\.png: No such file"):
        source[0]


def test_decoded_once_or_each_time_is_the_same(image_folder):
    source = FolderSource(image_folder)
    decoded = DecodedSource(source, SMALL)
    assert len(decoded) == len(source) == 60
    for i in (0, 31, 59):
        np.testing.assert_array_equal(load_image(decoded, i, SMALL), load_image(source, i, SMALL))
        assert decoded[i]["id"] == source.ids[i]


def test_the_fingerprint_changes_with_names_and_sizes_but_not_with_order(tmp_path):
    for name in ("cat/a.png", "cat/b.png", "dog/a.png"):
        _picture(tmp_path / name)
    source = FolderSource(tmp_path)
    before = fingerprint(source)
    source.ids.reverse()
    source.labels = source.labels[::-1]
    assert fingerprint(source) == before
    Image.new("RGB", (50, 50)).save(tmp_path / "dog" / "a.png")
    other_size = fingerprint(FolderSource(tmp_path))
    assert other_size != before
    _picture(tmp_path / "dog" / "a.png")
    assert fingerprint(FolderSource(tmp_path)) == before
    _picture(tmp_path / "dog" / "new.png")
    assert fingerprint(FolderSource(tmp_path)) != before


@pytest.mark.parametrize("name", ["", "folder:", "tfds:", "shapes:0", "shapes:x", "/data", "csv:x"])
def test_a_name_of_no_known_form_is_a_configuration_error(name):
    with pytest.raises(ConfigError, match="a source must be"):
        open_source(name)


class TwoColours(tfds.core.GeneratorBasedBuilder):
    """A small real TFDS data set; some labels are withheld."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
                    "label": tfds.features.ClassLabel(names=["dark", "light"]),
                }
            ),
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(12), "test": self._generate_examples(4, True)}

    def _generate_examples(self, count, withhold=False):
        for i in range(count):
            pixels = np.full((5 + i, 6, 3), 200 * (i % 2) + i, np.uint8)
            file = io.BytesIO()  # TFDS needs TensorFlow to encode an array.
            Image.fromarray(pixels).save(file, "PNG")
            file.seek(0)
            yield i, {"image": file, "label": -1 if withhold and i == 0 else i % 2}


@pytest.fixture
def tfds_folder(tmp_path, monkeypatch):
    TwoColours(data_dir=str(tmp_path), file_format="array_record").download_and_prepare()
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    return tmp_path


def test_a_prepared_tfds_data_set_is_read_by_random_access(tfds_folder):
    source = open_source("tfds:two_colours")
    assert source.class_names == ["dark", "light"]
    assert len(source) == len(set(source.ids)) == 15
    assert source.num_ignored == 1
    for i in (14, 0, 7):
        example = source[i]
        pixels = decode.decode(example["image"])
        assert pixels.shape[1:] == (6, 3)
        assert example["label"] == int(pixels[0, 0, 0] >= 200) == source.labels[i]


def test_an_unknown_tfds_name_is_explained(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises(DataError, match="knows no such data set") as error:
        open_source("tfds:no_such_data_set")
    assert "\n" not in str(error.value)


def test_a_tfds_data_set_that_cannot_be_downloaded_says_what_to_run(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise ConnectionError("no network\nat all")

    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", refuse)
    with pytest.raises(DataError, match=r"tfds build eurosat/rgb --file_format=array_record"):
        open_source("tfds:eurosat/rgb")


def test_shapes_can_be_shortened(tmp_path, monkeypatch):
    monkeypatch.setenv("CNN_JAX_CACHE", str(tmp_path))
    source = open_source("shapes:20")
    assert source.name == "shapes:20"
    assert len(source) == 20
    assert len(source.class_names) == 10
