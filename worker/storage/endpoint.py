"""Reads what the endpoint of an S3-compatible store says: its host, its region and, from other workers, its bucket."""

from __future__ import annotations

import re
from urllib.parse import urlsplit


def without_bucket(endpoint_url: str | None, bucket: str) -> str | None:
    """Return the endpoint without the bucket's name. Other workers want it there, but boto3 would add it again."""
    if endpoint_url is None:
        return None
    endpoint_url = re.sub(rf"^(https?://){re.escape(bucket)}\.", r"\1", endpoint_url.rstrip("/"))
    return endpoint_url.removesuffix(f"/{bucket}")


def host_of(endpoint_url: str | None) -> str:
    """Return the host. Raises ValueError for what boto3 would reject only at the upload: other schemes and impossible ports."""
    if endpoint_url is None:
        return "s3.amazonaws.com"
    parts = urlsplit(endpoint_url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0 or parts.username is not None:
        raise ValueError("no endpoint")
    return parts.hostname


_REGIONS = (
    r"\bs3(?:-fips)?(?:\.dualstack)?[.-]([a-z]{2,}-[a-z0-9-]+)\.",  # AWS, Backblaze B2, Wasabi, Scaleway, and others like them
    r"\bs3api-([a-z0-9-]+)\.runpod\.io$",
    r"\bs3\.([a-z0-9-]+)\.(?:io|perf)\.cloud\.ovh\.",
    r"\bcos\.([a-z0-9-]+)\.myqcloud\.com$",
    r"\boss-([a-z0-9-]+)\.aliyuncs\.com$",
    r"\b([a-z]{3}\d)\.digitaloceanspaces\.com$",
    r"\b([a-z]{2}-[a-z]+-\d)\.linodeobjects\.com$",
)


def region_of(endpoint_url: str | None) -> str:
    """Return the region in the endpoint's name. R2 needs `auto`; stores such as MinIO accept any."""
    host = host_of(endpoint_url)
    if host.endswith(".r2.cloudflarestorage.com"):
        return "auto"
    return next((match[1] for pattern in _REGIONS if (match := re.search(pattern, host))), "us-east-1")
