"""Tests of the report of an ensemble."""

import json
import pathlib
import shutil

import numpy as np
import pytest
from bundles import make_bundle
from exports import write_test_bundle
from PIL import Image

from cnn_jax.ensemble import make_ensemble
from cnn_jax.inference.bundle import digest, read_networks
from cnn_jax.inference.calibration import mutual_information
from cnn_jax.inference.ensemble import EnsemblePredictor
from cnn_jax.inference.evaluation import open_as_trained
from cnn_jax.report import __main__ as command
from cnn_jax.report import run_report, style
from cnn_jax.report.run import MissingError
from cnn_jax.report.run_report import write_report
from cnn_jax.system.errors import BundleError


def _write_members(folder, image_folder, seeds):
    """Writes the bundles of networks that are trained on nothing and have the same splits."""
    return [
        write_test_bundle(folder / str(seed), image_folder, variables=make_bundle(seed).variables)
        for seed in seeds
    ]


def _no_section(run):
    raise MissingError("Not measured in this test.")


def _figures(ensemble):
    return json.loads((ensemble / "report" / "metrics.json").read_text())


@pytest.fixture(scope="module", autouse=True)
def undrawn():
    """Replaces charts with images of one pixel, because drawing takes seconds."""

    def draw(path, *_):
        for theme in style.THEMES:
            Image.new("RGBA", (1, 1)).save(path.with_stem(path.stem + theme.suffix))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(style, "draw", draw)
        yield


@pytest.fixture(scope="module")
def ensemble(image_folder, tmp_path_factory):
    """The folder of an ensemble of three networks and two views, with its report."""
    folder = tmp_path_factory.mktemp("ensemble")
    path = folder / "ensemble"
    make_ensemble(_write_members(folder, image_folder, range(3)), path, flip="horizontal")
    # The corruptions take seconds, and the report of a run tests them.
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(run_report._FULL, "robustness", _no_section)
        write_report(path)
    return path


def test_the_report_measures_the_members_and_their_disagreement(ensemble):
    figures = _figures(ensemble)
    predictor = EnsemblePredictor(read_networks(ensemble))
    for split, metrics in predictor.metrics.items():
        assert figures[split]["accuracy"] == pytest.approx(metrics["accuracy"])
    dataset = open_as_trained(predictor)
    test = dataset.splits["test"]
    images, labels = dataset.loader.load(test)["image"], dataset.source.labels[test]
    plain, flipped = (
        np.stack([member(view) for member in predictor.members])
        for view in (images, images[:, :, ::-1])
    )
    found = figures["members"]
    for member, probabilities in zip(found["members"], plain, strict=True):
        assert member["accuracy"] == pytest.approx((probabilities.argmax(1) == labels).mean())
        loss = -np.log(probabilities[np.arange(len(labels)), labels]).mean()
        assert member["loss"] == pytest.approx(loss, rel=1e-5)
    every = np.concatenate([plain, flipped])
    classes, is_right = every.argmax(2), every.mean(0).argmax(1) == labels
    is_unanimous = classes.min(0) == classes.max(0)
    assert found["predictions"] == 6
    assert found["unanimous"] == is_unanimous.sum()
    assert found["unanimous_correct"] == (is_unanimous & is_right).sum()
    assert found["disputed_correct"] == (~is_unanimous & is_right).sum()
    disagreement = np.sort(mutual_information(every))
    assert sum(group["images"] for group in found["groups"]) == len(labels)
    assert found["groups"][-1]["disagreement"] == pytest.approx(disagreement[-1], abs=1e-5)
    assert found["examples"][0]["disagreement"] == pytest.approx(disagreement[-1], abs=1e-5)


def test_the_page_has_the_sections_of_an_ensemble(ensemble):
    figures = _figures(ensemble)
    assert list(figures["missing"]) == ["explanations", "robustness"]
    page = (ensemble / "report" / "index.html").read_text()
    for name in ("members", "confusion", "calibration", "coverage", "mistakes", "label_errors"):
        assert name in figures
        assert f'<section id="{name}"' in page
    assert "Explanations need a single network." in page
    assert "Report of an ensemble" in page
    assert "flips: horizontal; shifts: 0 pixels" in page
    assert '<section id="curves"' not in page
    assert '<section id="augmentation"' not in page


def test_a_repeated_ensemble_replaces_the_report_of_the_earlier_one(image_folder, tmp_path, capsys):
    paths = _write_members(tmp_path, image_folder, range(3))
    ensemble = tmp_path / "ensemble"
    make_ensemble(paths[:2], ensemble)
    before = digest(ensemble)
    write_report(ensemble, detail="figures")
    assert digest(ensemble) == before
    read_networks(ensemble)  # A report does not damage the ensemble.
    make_ensemble(paths, ensemble)
    assert not (ensemble / "report").exists()


def test_the_report_of_an_ensemble_without_its_data_says_so(ensemble, image_folder, tmp_path):
    copy = pathlib.Path(shutil.copytree(ensemble, tmp_path / "copy"))
    description = json.loads((copy / "bundle.json").read_text())
    description["data"]["source"] = f"folder:{tmp_path / 'moved'}"
    (copy / "bundle.json").write_text(json.dumps(description))
    earlier = _figures(copy)
    write_report(copy, detail="figures")
    assert "The data cannot be read" in _figures(copy)["summary"]["notice"]
    assert _figures(copy)["members"] == earlier["members"]
    write_report(copy, detail="figures", source=f"folder:{image_folder}")
    assert "notice" not in _figures(copy)["summary"]


def test_a_damaged_ensemble_is_refused(ensemble, tmp_path):
    shutil.copytree(ensemble, tmp_path / "copy")
    (tmp_path / "copy" / "members" / "1" / "weights.safetensors").write_bytes(b"")
    with pytest.raises(BundleError, match="is damaged"):
        command.main([f"--run={tmp_path / 'copy'}"])
