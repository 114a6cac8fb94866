"""Turns the address of a store into a spec for tensorstore, with limits on retries, silence and memory.

An s3:// URL names bucket and path. Everything else comes from the environment, under the names that the tools of AWS
use: keys or a profile, which tensorstore reads itself, and for other servers (MinIO, Ceph, R2) endpoint and region,
which are read here.
"""

import os
import shutil
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

import tensorstore as ts

from store.errors import UserError

_LEGAL = "legal are a folder, file://, s3://, gs:// and memory://, and, for reading only, http:// and https://"

# Half a minute of retries: shorter than another job waits before it takes over a lock without heartbeat.
_RETRIES = {"max_retries": 6, "initial_delay": "1s", "max_delay": "8s"}
_SILENCE_SECONDS = "30"  # without a byte, or without a connection: the request is canceled and tried again
_LIMITS = {  # without them tensorstore waits forever for a server that accepts a connection and never answers
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
    """The folder of a file:// URL; None for other URLs."""
    return Path(os.fsdecode(unquote_to_bytes(url.removeprefix("file://")))) if url.startswith("file://") else None


def kvstore_spec(url: str) -> dict[str, Any]:
    """The spec that tensorstore opens for a URL; keys are appended to its `path`.

    Raises:
        UserError: the kind of URL is unknown, the bucket's name is not legal, or the endpoint is not a URL.
    """
    try:
        spec: dict[str, Any] = ts.KvStore.Spec(url).to_json()
    except ValueError as error:
        reason = str(error).removeprefix(f'Parsing spec from url: "{url}": ').split(" [", maxsplit=1)[0]
        raise UserError(f"cannot open {url}: {reason}; {_LEGAL}") from error
    return {"path": "", **spec, **(_s3_options() if spec["driver"] == "s3" else {})}


def _s3_options() -> dict[str, Any]:
    options: dict[str, Any] = {}
    name = next((name for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL") if os.environ.get(name)), None)
    if name:
        endpoint = os.environ[name].rstrip("/")
        if not endpoint.startswith(("http://", "https://")):
            raise UserError(f"{name} is {endpoint!r}, which is not a URL; give one such as http://localhost:9000")
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
        options = {"endpoint": endpoint, "aws_region": region}
    if os.environ.get("AWS_ACCESS_KEY_ID"):  # keeps tensorstore from looking elsewhere, and from logging that
        options["aws_credentials"] = {"type": "environment"}
    return options


def array_options(url: str) -> dict[str, Any]:
    """Further members of tensorstore's spec of an array: in an object store, a cache of the shards' indices.

    Without it every batch would request them again. An index is cached until the array is opened again; a shard that
    was replaced in the meantime is not misread, since chunks are requested on condition that their shard is the one of
    the index. Samples are not cached. A local disk needs none of it: the operating system caches files.
    """
    remote = not url.startswith(("file://", "memory://"))
    return {"metadata_cache_pool": _INDEX_POOL, "recheck_cached_data": "open"} if remote else {}


def new_context() -> ts.Context:
    """A tensorstore context with limits on retries, silence and memory."""
    for name, limit in _LIMITS.items():
        os.environ.setdefault(name, limit)  # tensorstore reads them at its first request
    return ts.Context(
        {
            "s3_request_retries": _RETRIES,
            "gcs_request_retries": _RETRIES,
            "http_request_retries": _RETRIES,
            _INDEX_POOL: {"total_bytes_limit": _INDEX_BYTES},
        }
    )


def free_disk_bytes(url: str) -> int | None:
    """Free bytes on the disk of a store, which need not exist yet; None where it is not on a local disk."""
    existing = _existing_folder(url)
    return shutil.disk_usage(existing).free if existing else None


def disk_number(url: str) -> int | None:
    """A number that stores on the same local disk share; None where a store is not on a local disk."""
    existing = _existing_folder(url)
    return existing.stat().st_dev if existing else None


def _existing_folder(url: str) -> Path | None:
    """The folder of a store, or the lowest one above it that exists; None where it is not local."""
    path = local_path(url)
    return next((parent for parent in (path, *path.parents) if parent.exists()), None) if path else None
