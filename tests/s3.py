"""An S3 server on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest


@contextmanager
def serve_s3(bucket: str) -> Iterator[Any]:
    """Yield boto3's client of a server with a new bucket, which pyarrow finds by its environment variables."""
    boto3 = pytest.importorskip("boto3", reason="the extra dev is not installed")
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    settings = {"ACCESS_KEY_ID": "me", "SECRET_ACCESS_KEY": "x", "REGION": "us-east-1"}
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in {**settings, "ENDPOINT_URL": f"http://{host}:{port}"}.items():
                patch.setenv(f"AWS_{name}", value)
            client = boto3.client("s3", region_name="us-east-1", endpoint_url=f"http://{host}:{port}")
            client.create_bucket(Bucket=bucket)
            yield client
    finally:
        server.stop()
