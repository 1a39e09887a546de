"""Object stores on this machine: S3, simulated by moto, and Azure Blob Storage, by Azurite.

moto is one of the test dependencies. Azurite is a program for Node.js. After
`npm install -g azurite@3.35.0`, `azurite-blob` is on the PATH, and the tests on Azure are not
skipped.
"""

import base64
import contextlib
import email.utils
import hashlib
import hmac
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
from conftest import free_port

BUCKET = "bucket"
# The account of all emulators of Azure, which is documented by Microsoft.
_ACCOUNT = "devstoreaccount1"
_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


@contextlib.contextmanager
def s3_service():
    """Starts an S3 service in a new process, with an empty bucket.

    Yields the environment variables of its clients.
    """
    pytest.importorskip("moto", reason="moto, which simulates S3, is not installed")
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with _service(
        sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)
    ) as process:
        _wait_for(f"{url}/moto-api/", process)
        urllib.request.urlopen(urllib.request.Request(f"{url}/{BUCKET}", method="PUT"))
        yield {
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_ENDPOINT_URL": url,
            "AWS_REGION": "us-east-1",
        }


@contextlib.contextmanager
def azure_service():
    """Starts Azure Blob Storage in a new process, with an empty container.

    Yields the environment variables of its clients.
    """
    program = shutil.which("azurite-blob")
    if program is None:
        pytest.skip("Azurite, which simulates Azure, is not installed")
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    options = ["--inMemoryPersistence", "--disableTelemetry", "--skipApiVersionCheck"]
    options += ["--blobPort", str(port)]
    with _service(program, "--blobHost", "127.0.0.1", *options) as process:
        _wait_for(url, process)
        _create_container(url)
        yield {"AZURE_STORAGE_USE_EMULATOR": "true", "AZURITE_BLOB_STORAGE_URL": url}


# A function that starts the service, for each protocol of URLs.
SERVICES = {"s3": s3_service, "az": azure_service}


def _create_container(url):
    """Creates the container.

    The signature is that of "Authorize with Shared Key" in Azure's reference.
    """
    headers = {"x-ms-date": email.utils.formatdate(usegmt=True), "x-ms-version": "2021-12-02"}
    lines = [f"{name}:{value}" for name, value in headers.items()]
    lines += [f"/{_ACCOUNT}/{_ACCOUNT}/{BUCKET}", "restype:container"]
    text = "PUT" + 12 * "\n" + "\n".join(lines)
    digest = hmac.digest(base64.b64decode(_KEY), text.encode(), hashlib.sha256)
    headers["Authorization"] = f"SharedKey {_ACCOUNT}:{base64.b64encode(digest).decode()}"
    target = f"{url}/{_ACCOUNT}/{BUCKET}?restype=container"
    urllib.request.urlopen(urllib.request.Request(target, method="PUT", headers=headers))


@contextlib.contextmanager
def _service(*command):
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            yield process
        finally:
            process.kill()


def _wait_for(url, process, seconds=60):
    end = time.monotonic() + seconds
    while True:
        try:
            urllib.request.urlopen(url, timeout=seconds).close()
            return
        except urllib.error.HTTPError as error:  # The service answers, if only with an error.
            error.close()
            return
        except urllib.error.URLError:
            if process.poll() is not None or time.monotonic() > end:
                raise
            time.sleep(0.1)
