"""Tests of the checks of experiments/benchmarks/ray_score.py, without Ray."""

import importlib
import sys
import types

import pytest


@pytest.fixture
def ray_score(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", types.ModuleType("ray"))
    return importlib.import_module("experiments.benchmarks.ray_score")


def test_a_predictor_must_fit_on_one_node(ray_score):
    nodes = [
        {"Alive": True, "Resources": {"CPU": 4.0, "GPU": 1.0}},
        {"Alive": True, "Resources": {"CPU": 6.0}},
        {"Alive": False, "Resources": {"CPU": 64.0}},
    ]
    assert ray_score.find_missing(nodes, {"CPU": 6, "GPU": 1}) == []
    (problem,) = ray_score.find_missing(nodes, {"CPU": 8, "GPU": 1})
    assert problem.startswith("--cpus=8: no node has more than 6;")
    assert len(ray_score.find_missing([], {"CPU": 1, "GPU": 0})) == 1


def test_an_output_folder_with_files_is_refused(ray_score, tmp_path, monkeypatch):
    assert ray_score.is_empty(str(tmp_path / "new"))
    assert ray_score.is_empty(tmp_path.as_uri())
    (tmp_path / "old.parquet").touch()
    assert not ray_score.is_empty(tmp_path.as_uri())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["", "--bundle=b", "--input=i", "--output=."])
    with pytest.raises(SystemExit, match=r"^--output: \. is not empty"):
        ray_score.main()
