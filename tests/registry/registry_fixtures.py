"""Fixtures: a small bundle, an S3 service, and an empty location for each kind of store.

Test modules load the fixtures by `pytest_plugins = ["registry_fixtures"]`. A second conftest.py
would hide the conftest.py in tests/ from `import`.
"""

import uuid

import pytest
from bundles import make_bundle
from s3 import BUCKET, s3_service

from cnn_jax.inference.bundle import write_bundle


@pytest.fixture(scope="session")
def bundle(tmp_path_factory):
    """A bundle with an untrained network: 16 x 16 pixels, three classes, accuracy 0.5."""
    path = tmp_path_factory.mktemp("bundles") / "bundle"
    write_bundle(make_bundle(), path)
    return path


@pytest.fixture(scope="session")
def s3():
    """The environment variables with which obstore connects to an S3 service on this machine."""
    pytest.importorskip("moto", reason="moto is not installed, which plays S3")
    with s3_service() as variables:
        yield variables


@pytest.fixture(params=["folder", "s3"])
def place(request, tmp_path, monkeypatch):
    """The URL of a new registry in a folder or on S3."""
    if request.param == "folder":
        return str(tmp_path / "new" / "registry")
    for name, value in request.getfixturevalue("s3").items():
        monkeypatch.setenv(name, value)
    return f"s3://{BUCKET}/{uuid.uuid4().hex}"
