"""A local S3 service, simulated by moto."""

import contextlib
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

BUCKET = "bucket"


@contextlib.contextmanager
def s3_service():
    """Starts an S3 service in a new process, with an empty bucket.

    Yields the environment variables of its clients.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    url = f"http://127.0.0.1:{port}"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            _wait_for(f"{url}/moto-api/", process)
            urllib.request.urlopen(urllib.request.Request(f"{url}/{BUCKET}", method="PUT"))
            yield {
                "AWS_ACCESS_KEY_ID": "key",
                "AWS_SECRET_ACCESS_KEY": "secret",
                "AWS_ENDPOINT_URL": url,
                "AWS_REGION": "us-east-1",
            }
        finally:
            process.kill()


def _wait_for(url, process, seconds=60):
    end = time.monotonic() + seconds
    while True:
        try:
            urllib.request.urlopen(url).close()
            return
        except urllib.error.URLError:
            if process.poll() is not None or time.monotonic() > end:
                raise
            time.sleep(0.1)
