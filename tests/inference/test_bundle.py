import dataclasses
import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bundles import make_bundle
from jax.sharding import NamedSharding, PartitionSpec

from cnn_jax.data.preprocessing import Preprocessing
from cnn_jax.inference.bundle import Bundle, digest, read_bundle, read_reference, write_bundle
from cnn_jax.quality.reference import Reference
from cnn_jax.system.errors import BundleError


def test_a_written_bundle_is_read_unchanged(tmp_path):
    bundle = make_bundle(class_names=("ü", "猫"))
    write_bundle(bundle, tmp_path / "bundle")
    read = read_bundle(tmp_path / "bundle")
    for field in dataclasses.fields(Bundle):
        if field.name != "variables":
            assert getattr(read, field.name) == getattr(bundle, field.name)
    written = jax.tree.leaves_with_path(bundle.variables)
    assert len(written) == 16
    for (path, leaf), (read_path, read_leaf) in zip(
        written, jax.tree.leaves_with_path(read.variables), strict=True
    ):
        assert path == read_path
        assert read_leaf.dtype == np.float32
        np.testing.assert_array_equal(leaf, read_leaf)


def test_the_bytes_are_a_function_of_the_content(tmp_path):
    for name in ("first", "second"):
        write_bundle(make_bundle(), tmp_path / name)
    for file in ("bundle.json", "weights.safetensors"):
        first, second = ((tmp_path / name / file).read_bytes() for name in ("first", "second"))
        assert first == second
    assert sorted(path.name for path in (tmp_path / "first").iterdir()) == [
        "bundle.json",
        "weights.safetensors",
    ]


def test_a_digest_identifies_description_and_weights(tmp_path):
    for name, bundle in (
        ("one", make_bundle()),
        ("same", make_bundle()),
        ("other weights", make_bundle(seed=1)),
        ("other names", make_bundle(class_names=("a", "b", "c"))),
    ):
        write_bundle(bundle, tmp_path / name)
    one = digest(tmp_path / "one")
    assert one == hashlib.sha256((tmp_path / "one" / "bundle.json").read_bytes()).hexdigest()
    assert digest(tmp_path / "same") == one
    assert len({one, digest(tmp_path / "other weights"), digest(tmp_path / "other names")}) == 3


@pytest.mark.parametrize("damage", [lambda path: None, lambda path: (path / "bundle.json").mkdir()])
def test_a_missing_bundle_has_no_digest(tmp_path, damage):
    path = tmp_path / "bundle"
    path.mkdir()
    damage(path)
    with pytest.raises(BundleError, match=f"{path} (is not a bundle|cannot be read)"):
        digest(path)


def test_a_second_bundle_replaces_the_first(tmp_path):
    write_bundle(make_bundle(seed=0), tmp_path / "bundle")
    write_bundle(make_bundle(seed=1), tmp_path / "bundle")
    expected = make_bundle(seed=1).variables["params"]["head"]["kernel"]
    read = read_bundle(tmp_path / "bundle").variables["params"]["head"]["kernel"]
    np.testing.assert_array_equal(read, expected)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_one_flipped_bit_is_detected(tmp_path):
    write_bundle(make_bundle(), tmp_path / "bundle")
    path = tmp_path / "bundle" / "weights.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(BundleError, match=r"weights\.safetensors is damaged"):
        read_bundle(tmp_path / "bundle")


def _edit(path, **changes):
    description = json.loads((path / "bundle.json").read_text())
    (path / "bundle.json").write_text(json.dumps(description | changes))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / "bundle.json").unlink(), "is not a bundle: there is no"),
        (lambda path: (path / "weights.safetensors").unlink(), "is not a bundle: there is no"),
        (lambda path: (path / "bundle.json").write_text("{"), "is not a bundle"),
        (lambda path: (path / "bundle.json").write_text("[]"), "is not a bundle"),
        (lambda path: _edit(path, format=99), "format 99, and this version"),
        (lambda path: _edit(path, files={}), "is not a bundle"),
        (lambda path: _edit(path, preprocessing={}), "is not a bundle"),
    ],
)
def test_an_unreadable_bundle_has_a_clear_error(tmp_path, damage, message):
    path = tmp_path / "bundle"
    write_bundle(make_bundle(), path)
    damage(path)
    with pytest.raises(BundleError, match=message):
        read_bundle(path)


def test_a_missing_bundle_is_an_error(tmp_path):
    with pytest.raises(BundleError, match="is not a bundle: there is no"):
        read_bundle(tmp_path / "nowhere")


def test_a_file_name_that_leaves_the_bundle_is_refused(tmp_path):
    write_bundle(make_bundle(), tmp_path / "bundle")
    _edit(tmp_path / "bundle", files={"../../etc/passwd": {"sha256": ""}})
    with pytest.raises(BundleError, match="is not a bundle"):
        read_bundle(tmp_path / "bundle")


_LAYOUTS = {
    "contiguous": np.ascontiguousarray,
    "transposed": lambda array: np.ascontiguousarray(array.T).T,
    "Fortran": np.asfortranarray,
    "sliced": lambda array: np.repeat(array, 2, axis=-1)[..., ::2],
    "inner": lambda array: np.pad(array, 1)[tuple(slice(1, -1) for _ in array.shape)],
    "reversed": lambda array: np.ascontiguousarray(np.flip(array)[...])[
        (slice(None, None, -1),) * array.ndim
    ],
    "broadcast": lambda array: np.broadcast_to(array[:1], array.shape),
    "swapped bytes": lambda array: array.astype(array.dtype.newbyteorder()),
    "JAX": jnp.asarray,
    "JAX, transposed": lambda array: jnp.asarray(np.ascontiguousarray(array.T)).T,
    "JAX, on eight devices": lambda array: jax.device_put(
        np.concatenate([array] * 8), NamedSharding(jax.make_mesh((8,), ("x",)), PartitionSpec("x"))
    ),
}


@pytest.mark.parametrize("layout", _LAYOUTS)
@pytest.mark.parametrize("shape", [(5,), (3, 4), (2, 3, 4, 5)])
def test_arrays_of_any_memory_layout_keep_their_values(tmp_path, layout, shape):
    plain = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    array = _LAYOUTS[layout](plain)
    wanted = np.array(array, np.float32, order="C")
    bundle = dataclasses.replace(make_bundle(), variables={"params": {"kernel": array}})
    write_bundle(bundle, tmp_path)
    read = read_bundle(tmp_path).variables["params"]["kernel"]
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, wanted)


@pytest.mark.parametrize("scalar", [np.float32(0.5), np.array(3, np.int32), jnp.float32(0.25)])
def test_a_scalar_stays_a_scalar(tmp_path, scalar):
    bundle = dataclasses.replace(make_bundle(), variables={"params": {"scale": scalar}})
    write_bundle(bundle, tmp_path)
    read = read_bundle(tmp_path).variables["params"]["scale"]
    assert (read.shape, read.dtype, read) == ((), scalar.dtype, scalar)


def test_a_bundle_without_later_preprocessing_keys_has_their_defaults(tmp_path):
    preprocessing = Preprocessing(
        image_size=(16, 16),
        white_level=4095.0,
        resize="crop",
        crop_ratio=0.875,
        interpolation="bicubic",
    )
    write_bundle(dataclasses.replace(make_bundle(), preprocessing=preprocessing), tmp_path / "new")
    assert read_bundle(tmp_path / "new").preprocessing == preprocessing
    description = json.loads((tmp_path / "new" / "bundle.json").read_text("utf-8"))
    for key in ("white_level", "resize", "crop_ratio", "interpolation"):
        del description["preprocessing"][key]
    (tmp_path / "new" / "bundle.json").write_text(json.dumps(description), "utf-8")
    assert read_bundle(tmp_path / "new").preprocessing == Preprocessing(image_size=(16, 16))


def _reference():
    rng = np.random.default_rng(0)
    return Reference(
        statistics=rng.normal(size=(20, 5)).astype(np.float32),
        class_counts=np.array([10, 6, 4]),
        accuracy=np.asarray(0.9),
        class_means=np.asfortranarray(rng.normal(size=(3, 16)).astype(np.float32)),
        covariance=np.eye(16, dtype=np.float32),
        trust_classes=rng.normal(size=3),
        trust_means=rng.normal(size=10),
        trust_scales=np.ones(10),
        trust_weights=rng.normal(size=11),
        trust_limit=np.asarray(2.0),
        trust_factor=np.asarray(1.01),
    )


def test_reference_statistics_are_read_unchanged(tmp_path):
    write_bundle(make_bundle(), tmp_path / "bundle", _reference())
    read = read_reference(tmp_path / "bundle")
    for name, array in _reference().arrays().items():
        np.testing.assert_array_equal(read.arrays()[name], array)
        assert read.arrays()[name].dtype == array.dtype
    assert read_bundle(tmp_path / "bundle").model == make_bundle().model


def test_only_reference_statistics_need_format_3(tmp_path):
    """Earlier versions refuse format 3 with a clear message, and read format 2."""
    write_bundle(make_bundle(), tmp_path / "without")
    write_bundle(make_bundle(), tmp_path / "with", _reference())
    formats = [
        json.loads((tmp_path / name / "bundle.json").read_text())["format"]
        for name in ("without", "with")
    ]
    assert formats == [2, 3]
    assert read_reference(tmp_path / "without") is None


def test_damaged_reference_statistics_are_detected(tmp_path):
    write_bundle(make_bundle(), tmp_path / "bundle", _reference())
    path = tmp_path / "bundle" / "reference.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    for read in (read_bundle, read_reference):
        with pytest.raises(BundleError, match=r"reference\.safetensors is damaged"):
            read(tmp_path / "bundle")
