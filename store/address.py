"""Where a store lies: its URL, and what tensorstore is told to reach it and to give up on it.

An s3:// URL names bucket and path. What it has no room for comes from the environment, under the names that the tools
of AWS use: keys or a profile, which tensorstore reads itself, and for other servers (MinIO, Ceph, R2) endpoint and
region, which it does not.
"""

import os
import shutil
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

import tensorstore as ts

from store.errors import UserError

_LEGAL = "legal are a folder, file://, s3://, gs:// and memory://, and to read alone http:// and https://"

# Half a minute of trying, then one clear error: shorter than another job waits before it takes a silent lock over.
_RETRIES = {"max_retries": 6, "initial_delay": "1s", "max_delay": "8s"}
_SILENCE_SECONDS = "30"  # without a byte, or without a connection: the request is given up and tried again
_LIMITS = {  # tensorstore has none, and would wait for ever on a server that accepts and never answers
    "TENSORSTORE_CURL_CONNECT_TIMEOUT_SECONDS": _SILENCE_SECONDS,
    "TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS": _SILENCE_SECONDS,
    "TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES": "1",
}
_INDEX_POOL, _INDEX_BYTES = "cache_pool#shard_index", 256 * 2**20


def store_url(path: str | Path) -> str:
    """A folder or URL as a URL that ends in a slash.

    Raises:
        UserError: the path is empty.
    """
    text = str(path)
    if not text.strip():
        raise UserError("store.path is empty; give a folder, or a URL such as s3://bucket/cache.zarr")
    url = text if "://" in text else Path(text).expanduser().absolute().as_uri()
    scheme, rest = url.split("://", maxsplit=1)
    rest = rest.rstrip("/")
    return f"{scheme}://{rest}/" if rest or scheme == "file" else f"{scheme}://"


def local_path(url: str) -> Path | None:
    """The folder behind a file:// URL, else None."""
    return Path(os.fsdecode(unquote_to_bytes(url.removeprefix("file://")))) if url.startswith("file://") else None


def kvstore_spec(url: str) -> dict[str, Any]:
    """What tensorstore opens at a URL; keys lie below its `path`.

    Raises:
        UserError: no such kind of URL, a bucket's name that cannot be, or an endpoint that is no URL.
    """
    try:
        spec: dict[str, Any] = ts.KvStore.Spec(url).to_json()
    except ValueError as error:
        reason = str(error).removeprefix(f'Parsing spec from url: "{url}": ').split(" [", maxsplit=1)[0]
        raise UserError(f"cannot open {url}: {reason}; {_LEGAL}") from error
    return {"path": "", **spec, **(_s3_members() if spec["driver"] == "s3" else {})}


def _s3_members() -> dict[str, Any]:
    members: dict[str, Any] = {}
    name = next((name for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL") if os.environ.get(name)), None)
    if name:
        endpoint = os.environ[name].rstrip("/")
        if not endpoint.startswith(("http://", "https://")):
            raise UserError(f"{name} is {endpoint!r}, which is no URL; give one such as http://localhost:9000")
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
        members = {"endpoint": endpoint, "aws_region": region}
    if os.environ.get("AWS_ACCESS_KEY_ID"):  # they go first anyway; told so, tensorstore logs nothing of other places
        members["aws_credentials"] = {"type": "environment"}
    return members


def array_members(url: str) -> dict[str, Any]:
    """What else tensorstore is told of an array at a URL.

    Of an object store it keeps the indices of shards, which every batch would otherwise ask for again, and believes
    them until the array is opened anew. A shard that is replaced meanwhile is not misread: chunks are asked for on
    condition that their shard is still the one that the index came from. Samples themselves are not kept. On a local
    disk the operating system keeps all of it.
    """
    remote = not url.startswith(("file://", "memory://"))
    return {"metadata_cache_pool": _INDEX_POOL, "recheck_cached_data": "open"} if remote else {}


def new_context() -> ts.Context:
    """Limits on requests that are tried again, on silence and on memory."""
    for name, limit in _LIMITS.items():
        os.environ.setdefault(name, limit)  # the one way to tell tensorstore; before its first request
    return ts.Context(
        {
            "s3_request_retries": _RETRIES,
            "gcs_request_retries": _RETRIES,
            "http_request_retries": _RETRIES,
            _INDEX_POOL: {"total_bytes_limit": _INDEX_BYTES},
        }
    )


def free_disk_bytes(url: str) -> int | None:
    """Free bytes where a store is, or will be; None where it is not on a local disk."""
    path = local_path(url)
    existing = next((parent for parent in (path, *path.parents) if parent.exists()), None) if path else None
    return shutil.disk_usage(existing).free if existing else None
