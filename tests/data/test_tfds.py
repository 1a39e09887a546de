import io
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from conftest import REPOSITORY
from PIL import Image

from cnn_jax.data import decode
from cnn_jax.data.sources import open_source
from cnn_jax.system.errors import DataError


class TwoColours(tfds.core.GeneratorBasedBuilder):
    """A small data set built by TFDS, in which some labels are missing."""

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
            # Pillow encodes the image, because TFDS needs TensorFlow in order to encode an array.
            file = io.BytesIO()
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
    assert source.ignored == {"without a label": 1}
    assert source.own_splits == ["test"] * 3 + ["train"] * 12
    for i in (14, 0, 7):
        pixels = decode.decode(source.read(source.keys[i]))
        assert pixels.shape[1:] == (6, 3)
        assert int(pixels[0, 0, 0] >= 200) == source.labels[i]


def test_a_part_of_a_tfds_data_set_can_be_taken(tfds_folder):
    whole = open_source("tfds:two_colours:train")
    assert len(whole) == 12
    assert set(whole.own_splits) == {""}
    half = open_source("tfds:two_colours:1.0.0:train[:50%]")
    assert half.labels.tolist() == whole.labels[:6].tolist()
    # The ID of an example does not depend on the slice of the data set that is opened.
    assert half.ids == whole.ids[:6] == open_source("tfds:two_colours").ids[3:9]
    parts = open_source("tfds:two_colours:train[75%:]+test[:2]")
    tested = [i for i in open_source("tfds:two_colours:test").ids if i in ("test/0", "test/1")]
    assert parts.ids == [*whole.ids[9:], *tested]
    assert [parts.read(parts.keys[i]) for i in range(3)] == [
        whole.read(whole.keys[i]) for i in range(9, 12)
    ]
    for wrong in ("train[50%:10%]", "train[x]"):
        with pytest.raises(DataError, match="has no split"):
            open_source(f"tfds:two_colours:{wrong}")
    with pytest.raises(DataError, match="has no split 'holdout'; it has"):
        open_source("tfds:two_colours:holdout")


def test_a_tfds_data_set_trains_without_tensorflow(tfds_folder, tmp_path):
    code = (
        "from configs import default\n"
        "from cnn_jax.training.loop import train_and_evaluate\n"
        "config = default.get_config()\n"
        "config.data.source, config.data.image_size = 'tfds:two_colours', (8, 8)\n"
        "config.model.features, config.train.epochs, config.train.batch_size = (4,), 1, 4\n"
        f"report = train_and_evaluate(config, {str(tmp_path / 'run')!r})\n"
        "import sys; assert 'tensorflow' not in sys.modules\n"
        "assert report['test']['count'] == 3\n"
        "assert report['train']['count'] + report['validation']['count'] == 12\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY)


def test_an_unknown_tfds_name_is_explained(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises(DataError, match="knows no such data set") as error:
        open_source("tfds:no_such_data_set")
    assert "\n" not in str(error.value)


def test_a_failed_tfds_download_says_which_command_to_run(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise ConnectionError("no network\nat all")

    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", refuse)
    with pytest.raises(DataError, match=r"tfds build eurosat/rgb --file_format=array_record"):
        open_source("tfds:eurosat/rgb")
