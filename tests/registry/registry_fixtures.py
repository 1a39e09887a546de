"""Fixtures: a small bundle, object stores, and an empty location for each kind of store.

Test modules load the fixtures by `pytest_plugins = ["registry_fixtures"]`. A second conftest.py
would hide the conftest.py in tests/ from `import`.
"""

import uuid

import pytest
from bundles import make_bundle
from object_stores import BUCKET, SERVICES

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
    with SERVICES["s3"]() as variables:
        yield variables


@pytest.fixture(scope="session")
def az():
    """The environment variables with which obstore connects to Azurite on this machine."""
    with SERVICES["az"]() as variables:
        yield variables


@pytest.fixture(params=["folder", *SERVICES])
def place(request, tmp_path, monkeypatch):
    """The URL of a new registry in a folder, on S3 or on Azure."""
    if request.param == "folder":
        return str(tmp_path / "new" / "registry")
    for name, value in request.getfixturevalue(request.param).items():
        monkeypatch.setenv(name, value)
    return f"{request.param}://{BUCKET}/{uuid.uuid4().hex}"
