import dataclasses
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_tiny_config, require_devices
from test_step import MODEL, PREPROCESSING, _batch, _train_step, assert_trees_equal

from cnn_jax.config import files
from cnn_jax.config.resolve import resolve
from cnn_jax.data.preprocessing import Preprocessing
from cnn_jax.ensemble import make_ensemble
from cnn_jax.inference.bundle import read_bundle, write_bundle
from cnn_jax.inference.evaluation import open_as_trained
from cnn_jax.inference.predictor import BundlePredictor
from cnn_jax.models.cnn import CNN
from cnn_jax.system.errors import BundleError, ConfigError, DataError
from cnn_jax.training.distillation import Distillation, _Teacher
from cnn_jax.training.loop import train_and_evaluate
from cnn_jax.training.programs import Programs

SMALL = CNN(num_classes=3, features=(4,), dense=0)
# The second teacher has larger images, another normalisation and another order of the classes.
LARGE = Preprocessing(image_size=(16, 16), mean=(100.0, 110.0, 120.0), std=(50.0, 60.0, 70.0))
TEACHERS = (
    _Teacher(MODEL, PREPROCESSING, 1.5, (0, 1, 2)),
    _Teacher(SMALL, LARGE, 0.5, (2, 0, 1)),
)


def _variables():
    """The variables of the teachers, with random statistics and biases."""
    rng = np.random.default_rng(0)
    return [
        jax.tree.map(
            lambda leaf: leaf + jnp.array(rng.uniform(0, 0.3, leaf.shape), leaf.dtype),
            model.init(jax.random.key(seed), jnp.zeros((1, *size, 3))),
        )
        for seed, (model, size) in enumerate(((MODEL, (8, 8)), (SMALL, (16, 16))))
    ]


def _doubled(levels):
    """Doubles the height and the width of images by linear interpolation, in NumPy."""
    for axis in (1, 2):
        position = np.clip((np.arange(16) + 0.5) / 2 - 0.5, 0, 7)
        below = np.minimum(position.astype(int), 6)
        shape = [1, 1, 1, 1]
        shape[axis] = 16
        part = (position - below).reshape(shape)
        levels = (1 - part) * levels.take(below, axis) + part * levels.take(below + 1, axis)
    return levels


def _softmax(logits):
    powers = np.exp(np.asarray(logits, np.float64))
    return powers / powers.sum(axis=-1, keepdims=True)


def test_the_loss_is_the_divergence_from_the_mean_prediction():
    variables, levels = _variables(), np.asarray(_batch()["image"], np.float64)
    logits = np.random.default_rng(1).normal(size=(8, 3)).astype(np.float32)
    inputs = ((levels - 127.5) / 127.5).astype(np.float32)
    first = MODEL.apply(variables[0], jnp.array(inputs))
    second = SMALL.apply(
        variables[1], jnp.array((_doubled(levels) - LARGE.mean) / LARGE.std, jnp.float32)
    )
    targets = (_softmax(first / (1.5 * 3)) + _softmax(second[:, [2, 0, 1]] / (0.5 * 3))) / 2
    own = _softmax(logits / 3)
    expected = 0.7 * 3**2 * np.sum(targets * np.log(targets / own), axis=1)
    term = Distillation(TEACHERS, PREPROCESSING, temperature=3.0, weight=0.7)
    found = term(jnp.array(inputs), jnp.array(logits), variables)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert expected.min() > 0


def test_the_labels_have_the_rest_of_the_weight():
    """The gradient is 0.3 times the labels' gradient plus the gradient of the teachers' term."""
    term = Distillation(TEACHERS, PREPROCESSING, temperature=3.0, weight=0.7)
    step = _train_step(MODEL.clone(dropout=0.0), extra_loss=term, label_weight=0.3)
    state, batch, variables = step.init_state(), _batch(), _variables()

    def gradient(step):
        (_, _), grads = jax.value_and_grad(step._loss, has_aux=True)(
            state.params, {}, batch, step._keys(state.step), count=jnp.array(8), extra=variables
        )
        return grads

    parts = (
        dataclasses.replace(step, extra_loss=None),
        dataclasses.replace(step, label_weight=0.0),
    )
    labels, teachers = map(gradient, parts)
    jax.tree.map(
        lambda both, a, b: np.testing.assert_allclose(both, 0.3 * a + b, atol=1e-5),
        gradient(step),
        labels,
        teachers,
    )


@pytest.mark.parametrize("is_stacked", [False, True])
def test_several_devices_and_steps_equal_single_ones(is_stacked):
    """Distillation with an average of the parameters, in parts of a batch."""
    require_devices(8)
    term = Distillation(TEACHERS, PREPROCESSING, temperature=2.0, weight=0.5)
    step = _train_step(
        MODEL.clone(batch_norm=False, dropout=0.0), extra_loss=term, label_weight=0.5, ema=0.9
    )
    programs, variables = Programs(step, 8), _variables()
    teachers = jax.tree.map(programs.layout.to_all_devices, jax.device_get(variables))
    batches = [jax.tree.map(np.asarray, _batch(seed=seed)) for seed in range(2)]
    many, one, jitted = programs.init_state(), step.init_state(), jax.jit(step)
    for part in [batches] if is_stacked else [[batch] for batch in batches]:
        program, arrays = programs.send(part)
        many, _ = program(many, arrays, None, teachers)
    for batch in batches:
        one, _ = jitted(one, batch, variables)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4),
        (many.params, many.average),
        (one.params, one.average),
    )


_OPTIONS = {
    "optimizer.algorithm": "sgd",
    "optimizer.learning_rate": 1e-2,
    "optimizer.final_learning_rate": 1e-4,
    "optimizer.schedule": "one_cycle",
    "optimizer.decay_epochs": 2,
    "train.ema": 0.9,
    "train.steps_per_execution": 2,
    "checkpoint.every_steps": 2,
    "checkpoint.keep": 9,
    "augment.crop_area": 0.3,
    "augment.trivial_augment": True,
    "augment.erasing_probability": 0.5,
    "augment.mixup_probability": 0.5,
    "distill.temperature": 3.0,
}


def _config(folder, **changes):
    fixed = {"train.epochs": 2, "report.detail": "none"}
    return make_tiny_config(folder, **(fixed | changes))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, image_folder):
    workdir = tmp_path_factory.mktemp("teacher") / "run"
    train_and_evaluate(_config(image_folder, **{"train.epochs": 1}), workdir)
    return workdir


def test_a_run_with_all_options_resumes_bit_for_bit(teacher, image_folder, tmp_path):
    """The bundle has the average of the parameters, which differs from the parameters."""
    config = _config(image_folder, **_OPTIONS, **{"distill.bundles": str(teacher)})
    train_and_evaluate(config, tmp_path / "whole")
    resumed = config.copy_and_resolve_references()
    # The run returns to step 8, in the second of two epochs of six steps.
    train_and_evaluate(resumed, tmp_path / "resumed")
    resumed.checkpoint.restore_step = 8
    train_and_evaluate(resumed, tmp_path / "resumed")
    whole, again = (read_bundle(tmp_path / name / "bundle") for name in ("whole", "resumed"))
    assert_trees_equal(whole.variables, again.variables)
    plain = config.copy_and_resolve_references()
    plain.train.ema, plain.augment.place = 0.0, "device"
    train_and_evaluate(plain, tmp_path / "plain")
    other = read_bundle(tmp_path / "plain" / "bundle").variables
    assert np.isfinite(other["params"]["head"]["kernel"]).all()
    assert not np.array_equal(
        other["params"]["head"]["kernel"], whole.variables["params"]["head"]["kernel"]
    )


def test_a_run_with_another_teacher_is_refused(teacher, image_folder, tmp_path):
    config = _config(image_folder, **{"train.epochs": 1, "distill.bundles": str(teacher)})
    train_and_evaluate(config, tmp_path / "run")
    config.distill.bundles = str(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"distill\.sha256: \w{64} -> \w{64}"):
        train_and_evaluate(config, tmp_path / "run")
    # The teacher may move, and several paths are one ensemble.
    config.distill.bundles = f"{teacher / 'bundle'}, {teacher}"
    resolved = resolve(config)
    assert resolved.distill.bundles == f"{teacher / 'bundle'},{teacher / 'bundle'}"
    resolved.distill.bundles = str(teacher)
    with pytest.raises(ConfigError, match="are not those of the configuration; restore them"):
        resolve(resolved)


def test_unsuitable_teachers_are_refused(teacher, image_folder, tmp_path):
    config = _config(image_folder, **{"distill.bundles": str(tmp_path / "nothing")})
    with pytest.raises(BundleError, match="nothing is not a bundle"):
        train_and_evaluate(config, tmp_path / "run")
    config.distill.bundles = str(teacher)
    config.seed = 5
    with pytest.raises(DataError, match=r"was trained on other splits: it has seen \d+ of the"):
        train_and_evaluate(config, tmp_path / "run")
    other = tmp_path / "images"
    for name in ("blue", "green", "yellow"):
        source = pathlib.Path(image_folder) / name.replace("yellow", "red")
        (other / name).mkdir(parents=True)
        for path in source.iterdir():
            (other / name / path.name).write_bytes(path.read_bytes())
    config = _config(other, **{"distill.bundles": str(teacher)})
    with pytest.raises(ConfigError, match=r"other classes than the data \('red' is only in one"):
        train_and_evaluate(config, tmp_path / "run")


@pytest.mark.parametrize("kind", ["link", "renamed"])
def test_a_teacher_of_a_copy_with_other_splits_is_refused(teacher, image_folder, tmp_path, kind):
    """The teacher's images have another path, or other names too."""
    other = tmp_path / "other"
    if kind == "link":
        other.symlink_to(image_folder)
    else:
        for path in pathlib.Path(image_folder).rglob("*.png"):
            (other / path.parent.name).mkdir(parents=True, exist_ok=True)
            shutil.copy(path, other / path.parent.name / f"x{path.name}")
    bundle = read_bundle(teacher / "bundle")
    data = bundle.data | {"source": f"folder:{other}"}
    data["division"] = data["division"] | {"seed": 1}
    own = open_as_trained(BundlePredictor(dataclasses.replace(bundle, data=data)))
    data["fingerprint"] = own.fingerprint
    write_bundle(dataclasses.replace(bundle, data=data), tmp_path / "teacher")
    config = _config(image_folder, **{"distill.bundles": str(tmp_path / "teacher")})
    with pytest.raises(DataError, match=r"it has seen \d+ of the \d+ test images"):
        train_and_evaluate(config, tmp_path / "run")
    if kind == "link":
        other.unlink()
        with pytest.raises(DataError, match="teacher: its training data cannot be opened"):
            train_and_evaluate(config, tmp_path / "run")


def test_a_finished_run_needs_no_teachers(teacher, image_folder, tmp_path):
    """More epochs need the same teachers."""
    shutil.copytree(teacher / "bundle", tmp_path / "teacher")
    bundles = str(tmp_path / "teacher")
    config = _config(image_folder, **{"train.epochs": 1, "distill.bundles": bundles})
    report = train_and_evaluate(config, tmp_path / "run")
    shutil.rmtree(tmp_path / "teacher")
    assert train_and_evaluate(config, tmp_path / "run")["test"] == report["test"]
    config.train.epochs = 2
    with pytest.raises(BundleError, match="teacher is not a bundle"):
        train_and_evaluate(config, tmp_path / "run")
    config = files.load(str(tmp_path / "run" / "config.json"), {"distill.bundles": ""})
    assert resolve(config).distill.sha256 == ""
    with pytest.raises(ConfigError, match=r"distill\.sha256: \w{64} -> "):
        train_and_evaluate(config, tmp_path / "run")


def test_a_teacher_with_another_preprocessing_or_views_is_refused(teacher, image_folder, tmp_path):
    config = _config(image_folder, **{"distill.bundles": str(teacher), "data.resize": "crop"})
    with pytest.raises(ConfigError, match=r"trained with data.resize=stretch, and this run has"):
        train_and_evaluate(config, tmp_path / "run")
    make_ensemble([teacher], tmp_path / "flipped", flip="horizontal")
    config = _config(image_folder, **{"distill.bundles": str(tmp_path / "flipped")})
    with pytest.raises(ConfigError, match="is an ensemble with views, which distillation does not"):
        train_and_evaluate(config, tmp_path / "run")
