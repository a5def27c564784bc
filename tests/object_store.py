"""A store that speaks S3's protocol, on a loopback port."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager

KEYS = {
    "AWS_ACCESS_KEY_ID": "someone",
    "AWS_SECRET_ACCESS_KEY": "their-secret",
    "AWS_DEFAULT_REGION": "us-east-1",
}


def why_no_object_store() -> str:
    """Return why there can be no object store here, or ""."""
    lacking = [name for name in ("moto", "boto3") if importlib.util.find_spec(name) is None]
    return (
        f"needs {' and '.join(lacking)}: pip install 'prompt-orchestrator[dev]'" if lacking else ""
    )


@contextmanager
def object_store(bucket: str) -> Iterator[dict[str, str]]:
    """Run a store with one empty bucket; yield the environment of a program that uses it."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    try:
        names = {
            "aws_access_key_id": KEYS["AWS_ACCESS_KEY_ID"],
            "aws_secret_access_key": KEYS["AWS_SECRET_ACCESS_KEY"],
        }
        boto3.client(
            "s3", endpoint_url=url, region_name=KEYS["AWS_DEFAULT_REGION"], **names
        ).create_bucket(Bucket=bucket)
        yield {**KEYS, "MLFLOW_S3_ENDPOINT_URL": url}
    finally:
        server.stop()
