"""Stores files in an S3-compatible bucket.

A bucket can be hostile: a call ends within its limit, whatever the bucket answers, and also when it does not answer.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, TypeVar

import boto3
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, InvalidRegionError

from worker.errors import Stopped
from worker.logs import log
from worker.net.addresses import NotPublic
from worker.net.download import DownloadError, fetch_bytes
from worker.net.privates import STORE_ANSWER_BYTES, TooSlow, guard_store
from worker.net.statuses import is_refusal
from worker.net.waiting import wait_for
from worker.storage.base import Limit, NotStored, Stored
from worker.storage.endpoint import host_of, region_of, without_bucket

T = TypeVar("T")

_TRANSFER = TransferConfig(preferred_transfer_client="classic")
"""Not the client that boto3 uses if awscrt is installed: its connections bypass `guard_store`."""
_CHECK = b"worker-wan-lora"
"""The content that the check at start stores."""
_MADE_FROM = "made-from"
"""The key in the objects' metadata."""
_MAX_CLOCK_DIFFERENCE = 60.0
"""The clocks of worker and store may differ by so much without a warning. S3 rejects a difference of 15 minutes."""


class BadBucket(Exception):
    """boto3 rejects these settings. `field`: endpoint_url or region."""

    def __init__(self, field: str) -> None:
        self.field = field
        self.rule = {
            "endpoint_url": "is not an endpoint; use https://host or https://host:port",
            "region": "is not a region; use a name such as eu-central-1 or auto",
        }[field]
        super().__init__(f"{field} {self.rule}")


class Bucket:
    """An S3-compatible bucket; results are presigned with SigV4. Raises BadBucket."""

    def __init__(
        self,
        name: str,
        access_key_id: str,
        secret_access_key: str,
        endpoint_url: str | None,
        region: str | None,
        addressing_style: str,
        key_prefix: str,
        ttl_seconds: int,
        session_token: str | None = None,
        public: bool = False,
    ) -> None:
        """`session_token` belongs to temporary keys. `public`: reach public addresses only; all others fail with NotPublic."""
        self._name = name
        self._public = public
        self._key_prefix = key_prefix
        self._ttl_seconds = ttl_seconds
        try:
            endpoint_url = without_bucket(endpoint_url, name)
            if addressing_style == "auto":
                addressing_style = "virtual" if host_of(endpoint_url).endswith("amazonaws.com") else "path"
            config = Config(
                signature_version="s3v4",
                s3={"addressing_style": addressing_style},  # type: ignore[arg-type]
                retries={"mode": "standard", "total_max_attempts": 3},
                connect_timeout=10,
                read_timeout=60,
                # Several S3-compatible stores refuse the checksums that boto3 adds by default.
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
            )
            # A look at what is there must not hold up a job when the store is away; once more, since a store may have closed
            # a connection that was kept.
            quick = config.merge(Config(retries={"total_max_attempts": 2}, connect_timeout=3, read_timeout=10))
            self._client, self._quick_client = (
                boto3.client(
                    "s3",
                    aws_access_key_id=access_key_id,
                    aws_secret_access_key=secret_access_key,
                    aws_session_token=session_token,
                    endpoint_url=endpoint_url,
                    region_name=region or region_of(endpoint_url),
                    config=config,
                )
                for config in (config, quick)
            )
            guard_store(self._client, public)
            guard_store(self._quick_client, public)
        except InvalidRegionError:
            raise BadBucket("region") from None
        except (ValueError, BotoCoreError):
            raise BadBucket("endpoint_url") from None

    def put(self, file: Path, key: str, content_type: str, made_from: str, limit: Limit) -> Stored:
        key = self._key_prefix + key
        size = file.stat().st_size
        options = {"ContentType": content_type, "Metadata": {_MADE_FROM: made_from}}

        def upload() -> None:
            self._client.upload_file(str(file), self._name, key, ExtraArgs=options, Config=_TRANSFER)

        self._call(upload, key, limit)
        return self._signed(key, size)

    def find(self, key: str, made_from: str, limit: Limit) -> Stored | None:
        key = self._key_prefix + key

        def look() -> Stored | None:
            head = self._quick_client.head_object(Bucket=self._name, Key=key)
            same = head["Metadata"].get(_MADE_FROM) == made_from
            return self._signed(key, head["ContentLength"]) if same else None

        try:
            return self._call(look, key, limit)
        except NotStored:
            return None

    def read(self, key: str, made_from: str, limit: Limit) -> bytes | None:
        key = self._key_prefix + key

        def read() -> bytes | None:
            answer = self._quick_client.get_object(Bucket=self._name, Key=key)
            same = answer["Metadata"].get(_MADE_FROM) == made_from
            return bytes(answer["Body"].read(STORE_ANSWER_BYTES)) if same else None

        try:
            return self._call(read, key, limit)
        except NotStored:
            return None

    def address(self, key: str, size: int) -> Stored:
        return self._signed(self._key_prefix + key, size)

    def check(self, limit: Limit) -> None:
        key = f"{self._key_prefix}.worker-wan-lora-write-check"
        try:
            answer = self._call(lambda: self._client.put_object(Bucket=self._name, Key=key, Body=_CHECK), key, limit)
        except NotStored as error:
            raise (error.__cause__ if isinstance(error.__cause__, NotPublic) else error) from error.__cause__
        clocks = self._compare_clocks(answer)
        try:
            wait_for(lambda: self._check_presigned(key, limit.stop), limit.check)
        except NotStored as error:
            raise NotStored(f"{error.message}{clocks and f'; {clocks}'}", error.refused) from error
        try:
            self._call(lambda: self._client.delete_object(Bucket=self._name, Key=key), key, limit)
        except NotStored as error:
            log.warning("the bucket stored `%s` but refused to delete it (%s)", key, _reason(error.__cause__ or error))

    def _call(self, call: Callable[[], T], key: str, limit: Limit) -> T:
        """Make the call and return its value. Raises NotStored for any failure, and Stopped."""
        try:
            return wait_for(call, limit.check)
        except (NotStored, Stopped):
            raise
        except Exception as error:  # on a hostile answer, boto3's parsers can raise anything
            raise self._not_stored(key, error) from error

    def _compare_clocks(self, answer: Any) -> str:
        """Warn if the clocks of worker and store differ: URLs are signed by the one and expire by the other."""
        try:
            theirs = parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"]).timestamp()
        except (KeyError, TypeError, ValueError):  # the store does not send its time
            return ""
        seconds = time.time() - theirs
        if abs(seconds) <= _MAX_CLOCK_DIFFERENCE:
            return ""
        off = f"{abs(seconds):.0f} s {'ahead of' if seconds > 0 else 'behind'}"
        valid = f"URLs are valid for {self._ttl_seconds} s by the bucket's"
        text = f"the worker's clock is {off} the bucket's, and {valid}; set the worker's clock"
        log.warning("%s", text)
        return text

    def _check_presigned(self, key: str, stop: threading.Event) -> None:
        """Download the file through a presigned URL, as the receiver of a result does. Raises NotStored."""
        try:
            body = fetch_bytes(self._signed(key, len(_CHECK)).url, 1000, stop, private=not self._public)
        except DownloadError as error:
            text = (
                f"the bucket accepts files, but they cannot be downloaded through a presigned URL ({error}); the keys need the "
                "permission GetObject, and the store must support presigned URLs (RunPod's own S3 API does not)"
            )
            raise NotStored(text, refused=error.status is not None and is_refusal(error.status)) from error
        if body != _CHECK:
            raise NotStored(
                "a presigned URL of the bucket returns another file than was stored; check the endpoint", refused=True
            )

    def _signed(self, key: str, size: int) -> Stored:
        expires = datetime.now(UTC) + timedelta(seconds=self._ttl_seconds)
        url = self._client.generate_presigned_url(
            "get_object", Params={"Bucket": self._name, "Key": key}, ExpiresIn=self._ttl_seconds
        )
        return Stored(url, key, expires.strftime("%Y-%m-%dT%H:%M:%SZ"), size)

    @staticmethod
    def _not_stored(key: str, error: Exception) -> NotStored:
        text = f"the bucket did not accept `{key}` ({_reason(error)}); check its name, endpoint, region, keys and permissions"
        return NotStored(text, _is_refusal(error))


def _client_error(error: BaseException | None) -> ClientError | None:
    """Return the store's own answer, which boto3 wraps."""
    while error is not None and not isinstance(error, ClientError):
        error = error.__cause__ or error.__context__
    return error


def _is_refusal(error: Exception) -> bool:
    """Return whether the store rejected the call (4xx). After any other failure a retry may succeed."""
    answer = _client_error(error)
    return answer is not None and is_refusal(answer.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 500))


def _reason(error: BaseException) -> str:
    """Return a few words without hosts or keys: the store's own error code, or the kind of failure."""
    if isinstance(error, TooSlow):
        return "it is too slow, or sends too much"
    if answer := _client_error(error):
        code = str(answer.response.get("Error", {}).get("Code", "refused"))
        return code if re.fullmatch(r"[\w.-]{1,64}", code, re.ASCII) else "refused"
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", type(error).__name__).lower()
