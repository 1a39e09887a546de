"""Tests of ensembles and test-time augmentation."""

import csv
import dataclasses
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from bundles import make_bundle
from exports import run_onnx, write_test_bundle
from scipy.special import softmax

import cnn_jax
from cnn_jax import ensemble as command
from cnn_jax import predict
from cnn_jax.data.splits import Division
from cnn_jax.ensemble import make_ensemble
from cnn_jax.explain import __main__ as explain
from cnn_jax.explain.maps import grad_cam
from cnn_jax.export import exporter
from cnn_jax.export.function import flat_function, stable_hlo
from cnn_jax.export.onnx_model import images_model
from cnn_jax.inference import bundle as bundles
from cnn_jax.inference.bundle import Ensemble, digest, read_bundle, read_networks, write_bundle
from cnn_jax.inference.calibration import fit_temperature, mutual_information
from cnn_jax.inference.ensemble import EnsemblePredictor, views
from cnn_jax.inference.evaluation import evaluate, open_as_trained, predict_split
from cnn_jax.inference.exported import load_predictor
from cnn_jax.inference.predictor import BundlePredictor, predict_batch
from cnn_jax.quality.corruptions import CORRUPTIONS
from cnn_jax.quality.robustness import measure_split
from cnn_jax.registry.evidence import compare_versions
from cnn_jax.registry.ledger import Gates, RegistryError
from cnn_jax.registry.registry import Registry
from cnn_jax.serve.versions import make_version
from cnn_jax.system.errors import BundleError, ConfigError, DataError


def _random_images(count=5):
    return np.random.default_rng(0).integers(0, 256, (count, 16, 16, 3), np.uint8)


def _ensemble(*temperatures, flip="none", shift=0, temperature=1.0):
    """Returns an ensemble of untrained networks with these temperatures."""
    members = [
        dataclasses.replace(make_bundle(seed), temperature=value)
        for seed, value in enumerate(temperatures)
    ]
    first = members[0]
    return Ensemble(
        members,
        flip,
        shift,
        first.class_names,
        first.preprocessing,
        temperature,
        first.data,
        first.metrics,
    )


def _write_member(path, folder, seed, **changes):
    metrics = {"test": {"accuracy": 0.5, "loss": 1.0}}
    changes = {"variables": make_bundle(seed).variables, "metrics": metrics} | changes
    return write_test_bundle(path, folder, **changes)


@pytest.fixture(scope="module")
def member_paths(image_folder, tmp_path_factory):
    """Three bundles of untrained networks that have the same splits of the image folder."""
    folder = tmp_path_factory.mktemp("members")
    return [
        _write_member(folder / str(seed), image_folder, seed, temperature=1.0 + seed)
        for seed in range(3)
    ]


@pytest.fixture(scope="module")
def written(member_paths, tmp_path_factory):
    """The folder of an ensemble with three members and two views."""
    folder = tmp_path_factory.mktemp("ensemble") / "bundle"
    make_ensemble(member_paths, folder, flip="horizontal")
    return folder


def test_disagreement_equals_values_computed_by_hand():
    certain = [[1.0, 0.0], [0.0, 1.0]]  # Two predictors are certain of different classes.
    equal = [[0.3, 0.7], [0.3, 0.7]]
    # Entropies in nats: 0.610864 of (0.7, 0.3), 0.325083 of (0.9, 0.1), 0.693147 of (0.5, 0.5).
    mixed = [[0.9, 0.1], [0.5, 0.5]]
    predictions = np.array([certain, equal, mixed], np.float32).transpose(1, 0, 2)
    expected = [np.log(2), 0.0, 0.610864 - (0.325083 + 0.693147) / 2]
    np.testing.assert_allclose(mutual_information(predictions), expected, atol=2e-6)
    assert mutual_information(predictions)[1] >= 0


def test_probabilities_are_the_calibrated_mean_of_calibrated_members():
    ensemble = _ensemble(0.5, 2.0, temperature=0.8)
    images = _random_images()
    members = [BundlePredictor(member)(images) for member in ensemble.members]
    expected = softmax(np.log(np.mean(members, axis=0)) / 0.8, axis=1)
    probabilities, disagreement = EnsemblePredictor(ensemble).predict_with_disagreement(images)
    np.testing.assert_allclose(probabilities, expected, rtol=1e-5)
    np.testing.assert_allclose(disagreement, mutual_information(np.array(members)), atol=1e-6)
    np.testing.assert_array_equal(EnsemblePredictor(ensemble)(images), probabilities)
    assert not np.allclose(members[0], members[1])


def test_views_are_the_flipped_and_shifted_images():
    image = np.arange(6, dtype=np.uint8).reshape(1, 2, 3, 1)
    found = [view[0, :, :, 0].tolist() for view in views(image, "horizontal_and_vertical", 0)]
    assert found == [
        [[0, 1, 2], [3, 4, 5]],
        [[2, 1, 0], [5, 4, 3]],
        [[3, 4, 5], [0, 1, 2]],
        [[5, 4, 3], [2, 1, 0]],
    ]
    assert [view[0, :, :, 0].tolist() for view in views(image, "none", 1)] == [
        [[0, 1, 2], [3, 4, 5]],
        [[3, 4, 5], [3, 4, 5]],  # Shifted up.
        [[0, 1, 2], [0, 1, 2]],
        [[1, 2, 2], [4, 5, 5]],  # Shifted to the left.
        [[0, 0, 1], [3, 3, 4]],
    ]
    counts = {"none": 1, "horizontal": 2, "vertical": 2, "horizontal_and_vertical": 4}
    images = _random_images()
    for flip, count in counts.items():
        for shift in (0, 3):
            ours = views(images, flip, shift)
            assert len(ours) == count * (5 if shift else 1)
            for one, other in zip(ours, views(jnp.asarray(images), flip, shift), strict=True):
                np.testing.assert_array_equal(one, other)


def test_one_member_with_views_is_test_time_augmentation():
    ensemble = _ensemble(1.5, flip="vertical")
    images = _random_images()
    member = BundlePredictor(ensemble.members[0])
    expected = (member(images) + member(images[:, ::-1])) / 2
    np.testing.assert_allclose(EnsemblePredictor(ensemble)(images), expected, rtol=1e-5)


def test_the_written_metrics_are_those_of_the_command_evaluate(written, member_paths):
    predictor = load_predictor(written)
    assert isinstance(predictor, EnsemblePredictor)
    dataset = open_as_trained(predictor)
    for split, metrics in predictor.metrics.items():
        measured = evaluate(predictor, dataset, split)
        for key in ("accuracy", "precision", "recall", "f1", "loss"):
            assert metrics[key] == pytest.approx(measured[key], rel=1e-6)
    assert list(predictor.metrics) == ["train", "validation", "test"]
    uncalibrated = dataclasses.replace(read_networks(written), temperature=1.0)
    indices = dataset.splits["validation"]
    probabilities = predict_split(EnsemblePredictor(uncalibrated), dataset.loader, indices)
    expected = fit_temperature(probabilities, dataset.source.labels[indices])
    assert predictor.temperature == pytest.approx(expected, rel=1e-6)
    assert abs(predictor.temperature - 1) > 0.01
    for number, path in enumerate(member_paths):
        assert digest(written / "members" / str(number)) == digest(path)


def test_the_robustness_is_that_of_the_ensemble(written):
    predictor = load_predictor(written)
    corruptions = {"gaussian_noise": CORRUPTIONS["gaussian_noise"]}
    measured = measure_split(predictor, open_as_trained(predictor), corruptions=corruptions)
    assert measured["clean"]["accuracy"] == pytest.approx(predictor.metrics["test"]["accuracy"])


def test_a_killed_command_gives_the_same_ensemble_when_repeated(
    written, member_paths, tmp_path, monkeypatch
):
    synced = []

    def killed(path):
        synced.append(path)
        if len(synced) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(bundles, "sync", killed)
    # SIGKILL would also skip the removal of the partial folder.
    monkeypatch.setattr(bundles.shutil, "rmtree", lambda path, **options: None)
    with pytest.raises(KeyboardInterrupt):
        make_ensemble(member_paths, tmp_path / "bundle", flip="horizontal")
    assert not (tmp_path / "bundle").exists()
    assert list(tmp_path.iterdir())
    monkeypatch.undo()
    for _ in range(2):  # The second call replaces a complete ensemble.
        make_ensemble(member_paths, tmp_path / "bundle", flip="horizontal")
        assert digest(tmp_path / "bundle") == digest(written)
        assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_the_command_prints_the_accuracy_of_the_members_and_the_ensemble(
    member_paths, tmp_path, capsys
):
    flags = ["--bundles", *map(str, member_paths[:2]), f"--output={tmp_path / 'new'}"]
    command.main([*flags, "--shift=1"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"{tmp_path}/new/bundle.json"
    metrics = read_networks(tmp_path / "new").metrics
    (line,) = (line for line in lines if line.startswith("ensemble"))
    assert f"{100 * metrics['test']['accuracy']:.2f} %" in line
    assert f"{metrics['test']['loss']:.4f}" in line
    assert read_networks(tmp_path / "new").shift == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "are the same bundle"),
        ({"class_names": ["green", "blue", "red"]}, "has another order of the classes than"),
        ({"class_names": ["black", "green", "red"]}, "has other classes than"),
        (
            {"preprocessing": dataclasses.replace(make_bundle().preprocessing, resize="pad")},
            r"data.resize = pad, and \S+ with stretch; the members of an ensemble need the same",
        ),
    ],
)
def test_members_that_do_not_fit_are_refused(
    member_paths, image_folder, tmp_path, changes, message
):
    seed = 1 if changes else 0
    temperature = 5.0 if changes else 1.0
    _write_member(tmp_path / "other", image_folder, seed, temperature=temperature, **changes)
    with pytest.raises(ConfigError, match=message):
        make_ensemble([member_paths[0], tmp_path / "other"], tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_members_may_normalise_the_pixels_differently(member_paths, image_folder, tmp_path):
    other = dataclasses.replace(make_bundle().preprocessing, mean=(0.0, 0.0, 0.0))
    _write_member(tmp_path / "other", image_folder, 1, preprocessing=other)
    make_ensemble([member_paths[0], tmp_path / "other"], tmp_path / "new")
    images = _random_images()
    first, second = (load_predictor(p)(images) for p in (member_paths[0], tmp_path / "other"))
    ensemble = dataclasses.replace(read_networks(tmp_path / "new"), temperature=1.0)
    np.testing.assert_allclose(EnsemblePredictor(ensemble)(images), (first + second) / 2, rtol=1e-5)


@pytest.mark.parametrize("is_renamed", [False, True])
def test_a_member_with_other_splits_is_refused(member_paths, image_folder, tmp_path, is_renamed):
    """A copy of an image is the same image, whatever its name is."""
    bundle = read_bundle(member_paths[1])
    data = bundle.data | {"division": Division(seed=1, rule="exact").to_dict()}
    if is_renamed:
        for path in image_folder.rglob("*.png"):
            (tmp_path / "images" / path.parent.name).mkdir(parents=True, exist_ok=True)
            shutil.copy(path, tmp_path / "images" / path.parent.name / f"x{path.name}")
        data |= {"source": f"folder:{tmp_path / 'images'}"}
    own = open_as_trained(BundlePredictor(dataclasses.replace(bundle, data=data)))
    data |= {"fingerprint": own.fingerprint}
    write_bundle(dataclasses.replace(bundle, data=data), tmp_path / "other")
    seen = {own.contents[i] for name in ("train", "validation") for i in own.splits[name]}
    dataset = open_as_trained(BundlePredictor.load(member_paths[0]))
    test = [dataset.contents[i] for i in dataset.splits["test"]]
    count = sum(content in seen for content in test)
    message = (
        rf"other was trained on other splits: it has seen {count} of the {len(test)} test images "
        r"of .*train it with the same splits \(data.split_seed, data.fold\)"
    )
    with pytest.raises(DataError, match=message):
        make_ensemble([member_paths[0], tmp_path / "other"], tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_changed_training_data_is_refused(image_folder, tmp_path):
    shutil.copytree(image_folder, tmp_path / "images")
    paths = [_write_member(tmp_path / f"{i}", tmp_path / "images", i) for i in range(2)]
    (tmp_path / "images" / "red" / "000.png").unlink()
    with pytest.raises(DataError, match=r"is not the data that .* was trained on, or has changed"):
        make_ensemble(paths, tmp_path / "new")
    make_ensemble(paths, tmp_path / "new", source=f"folder:{image_folder}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "name two bundles or more, or use --flip or --shift"),
        ({"shift": 16}, "--shift: must be below 16, the side of the images, got 16"),
    ],
)
def test_wrong_views_are_refused(member_paths, tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        make_ensemble(member_paths[:1], tmp_path / "new", **options)


def test_a_folder_with_other_files_is_not_replaced(member_paths, tmp_path):
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"files that are not of an ensemble, such as note\.txt"):
        make_ensemble(member_paths, tmp_path)
    with pytest.raises(ConfigError, match=r"not of an ensemble, such as bundle\.json"):
        make_ensemble(member_paths, member_paths[2])
    assert (tmp_path / "note.txt").read_text() == "mine"


def test_commands_that_need_one_network_name_a_member(written, member_paths, tmp_path):
    message = f"{written} is an ensemble, .*name the bundle of a member, such as .*members/0"
    with pytest.raises(BundleError, match=message):
        read_bundle(written)
    with pytest.raises(BundleError, match=message):
        make_ensemble([written, member_paths[0]], tmp_path / "new")
    flags = ["--input", str(tmp_path), f"--output={tmp_path / 'maps'}"]
    with pytest.raises(BundleError, match=message):
        explain.main([f"--bundle={written}", *flags])


@pytest.mark.parametrize("name", ["weights.safetensors", "bundle.json"])
def test_a_damaged_member_is_detected(written, tmp_path, name):
    shutil.copytree(written, tmp_path / "copy")
    file = tmp_path / "copy" / "members" / "1" / name
    file.write_bytes(file.read_bytes() + b" ")
    with pytest.raises(BundleError, match=f"members/1/{name} is damaged"):
        load_predictor(tmp_path / "copy")


@pytest.mark.parametrize(
    ("members", "message"),
    [(["/elsewhere"], "its files do not include the member"), ([], "its list of members is empty")],
)
def test_wrong_members_are_refused(written, tmp_path, members, message):
    shutil.copytree(written, tmp_path / "copy")
    description = json.loads((tmp_path / "copy" / "bundle.json").read_text())
    description["ensemble"]["members"] = members
    (tmp_path / "copy" / "bundle.json").write_text(json.dumps(description))
    with pytest.raises(BundleError, match=message):
        load_predictor(tmp_path / "copy")


def test_the_csv_has_the_disagreement_of_an_ensemble(written, image_folder, member_paths, tmp_path):
    for bundle in (written, member_paths[0]):
        output = tmp_path / "out.csv"
        predict.main([f"--bundle={bundle}", f"--input={image_folder}", f"--output={output}"])
        with output.open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert ("disagreement" in rows[0]) == (bundle == written)
        if bundle != written:
            continue
        predictor = load_predictor(written)
        predictions = predict_batch(predictor, [row["path"] for row in rows])
        assert [float(row["disagreement"]) for row in rows] == pytest.approx(
            [prediction.disagreement for prediction in predictions], abs=1e-6
        )
        assert max(prediction.disagreement for prediction in predictions) > 1e-4
    assert predict_batch(load_predictor(member_paths[0]), rows[0]["path"])[0].disagreement is None


def test_the_function_load_accepts_an_ensemble(written, image_folder):
    run = cnn_jax.load(written)
    assert run.metrics == read_networks(written).metrics
    (prediction,) = run.predict(image_folder / "red" / "000.png")
    assert prediction.disagreement > 0


def test_a_registry_keeps_an_ensemble_with_its_members(written, member_paths, image_folder):
    folder = written.parent / "registry"
    registry = Registry(folder)
    single = registry.add("colours", member_paths[0]).version
    version = registry.add("colours", written).version
    fetched = registry.fetch(version, folder / "fetched")
    images = _random_images()
    np.testing.assert_array_equal(load_predictor(fetched)(images), load_predictor(written)(images))
    accuracy = read_networks(written).metrics["test"]["accuracy"]
    with pytest.raises(RegistryError, match="min_accuracy"):
        registry.promote("colours", version.number, gates=Gates(min_accuracy=accuracy + 0.01))
    registry.promote("colours", version.number, gates=Gates(min_accuracy=accuracy))
    evidence = compare_versions(registry, single, "champion", f"folder:{image_folder}", 0.1)
    dataset = open_as_trained(load_predictor(written))
    assert evidence.images == len(dataset.splits["test"])
    assert evidence.reference_correct == round(accuracy * evidence.images)


def test_the_server_returns_disagreement_and_the_mean_map():
    ensemble = _ensemble(1.0, 2.0, flip="horizontal")
    version = make_version("shapes", 1, ensemble, "0", 10**6, sizes=(1, 2))
    images = _random_images(2)
    probabilities, disagreement = EnsemblePredictor(ensemble).predict_with_disagreement(images)
    outputs = list(version.explain_program.run(images))
    np.testing.assert_allclose([one.probabilities for one in outputs], probabilities, rtol=1e-6)
    np.testing.assert_allclose([one.disagreement for one in outputs], disagreement, atol=1e-6)
    classes = probabilities.argmax(axis=1)
    maps = [grad_cam(BundlePredictor(member), images, classes) for member in ensemble.members]
    scaled = [one / np.maximum(one.max(axis=(1, 2), keepdims=True), 1e-30) for one in maps]
    found = np.array([one.explanation for one in outputs])
    np.testing.assert_allclose(found, np.mean(scaled, axis=0), rtol=1e-4, atol=1e-6)
    other = make_version(
        "shapes", 2, _ensemble(3.0, 4.0, flip="horizontal"), "1", 10**6, (1, 2), [version]
    )
    assert other.predict_program.seconds is version.predict_program.seconds
    more = make_version("shapes", 3, _ensemble(3.0, 4.0), "2", 10**6, (1, 2), [version])
    assert more.predict_program.seconds is not version.predict_program.seconds


@pytest.mark.parametrize(("flip", "shift"), [("none", 0), ("horizontal_and_vertical", 2)])
def test_the_exported_function_equals_the_ensemble(flip, shift):
    pytest.importorskip("onnxruntime")
    ensemble = _ensemble(0.5, 2.0, flip=flip, shift=shift, temperature=0.7)
    predictor = EnsemblePredictor(ensemble)
    function = flat_function(predictor)
    model, hlo = images_model(function, predictor), stable_hlo(function, (16, 16))
    for count in (1, 5):
        images = _random_images(count)
        expected = predictor(images)
        np.testing.assert_allclose(run_onnx(model, images=images), expected, atol=5e-6)
        np.testing.assert_allclose(hlo.call(images), expected, atol=5e-6)


def test_an_exported_ensemble_is_loaded_like_any_export(written, tmp_path):
    pytest.importorskip("onnxruntime")
    exporter.export(written, tmp_path / "onnx")
    images = _random_images()
    exported = load_predictor(tmp_path / "onnx")
    np.testing.assert_allclose(exported(images), load_predictor(written)(images), atol=5e-6)
    for split, metrics in exported.metrics.items():
        loss = read_networks(written).metrics[split]["loss"]
        assert metrics["loss"] == pytest.approx(loss, rel=1e-5)
    with pytest.raises(BundleError, match="is an exported model"):
        read_networks(tmp_path / "onnx")
