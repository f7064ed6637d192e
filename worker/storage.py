"""Stores a finished file and returns its URL: in the worker's bucket, in a job's own bucket, or in a local folder.

Every call is one attempt. `delivery` decides about retries, and keeps a file that cannot be stored. A bucket can be hostile: a
call ends within its limit, whatever the bucket answers, and also when it does not answer.
"""

from __future__ import annotations

import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

import boto3
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, InvalidRegionError
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator

from worker.errors import Code, Problem, Stopped, WorkerError
from worker.files import atomic_write, inside
from worker.logs import log
from worker.net.addresses import NotPublic
from worker.net.download import DownloadError, fetch_bytes
from worker.net.privates import STORE_ANSWER_BYTES, TooSlow, guard_store
from worker.net.statuses import is_refusal
from worker.net.waiting import wait_for
from worker.settings import BUCKET_NAME, Settings, SettingsError

T = TypeVar("T")

_TRANSFER = TransferConfig(preferred_transfer_client="classic")
"""Not the client that boto3 uses if awscrt is installed: its connections bypass `guard_store`."""
_CHECK = b"worker-wan-lora"
"""The content that the check at start stores."""
_MADE_FROM = "made-from"
"""The key in the objects' metadata."""
_MAX_CLOCK_DIFFERENCE = 60.0
"""The clocks of worker and store may differ by so much without a warning. S3 rejects a difference of 15 minutes."""


@dataclass(frozen=True)
class Stored:
    """Where to download a file. `expires_at` is UTC in ISO 8601; None for a local file. `bytes` is its size."""

    url: str
    key: str
    expires_at: str | None
    bytes: int


class NotStored(WorkerError):
    """UPLOAD_FAILED. `refused`: the storage answered and rejected the call."""

    def __init__(self, message: str, refused: bool) -> None:
        super().__init__(Code.UPLOAD_FAILED, message)
        self.refused = refused


@dataclass(frozen=True)
class Limit:
    """How long a call may take."""

    stop: threading.Event
    """When set, the call raises Stopped."""
    ends: float = float("inf")
    """At this time of `time.monotonic()` the call raises NotStored."""

    @classmethod
    def of(cls, seconds: float, stop: threading.Event) -> Limit:
        """Return a limit that ends `seconds` from now."""
        return cls(stop, time.monotonic() + seconds)

    def check(self) -> None:
        if self.stop.is_set():
            raise Stopped
        if time.monotonic() > self.ends:
            raise NotStored("the bucket did not answer in time; check its endpoint", refused=False)


class Storage(Protocol):
    """A place for files. A call that exceeds its limit raises NotStored or Stopped."""

    def check(self, limit: Limit) -> None:
        """Write a small file and delete it again. Raises NotStored."""

    def put(self, file: Path, key: str, content_type: str, made_from: str, limit: Limit) -> Stored:
        """Store `file` under `key`, with `made_from` as a note unless it is "". Raises NotStored."""

    def find(self, key: str, made_from: str, limit: Limit) -> Stored | None:
        """Return the file under `key` if its `made_from` is the same; None otherwise, and if the storage does not answer."""

    def read(self, key: str, made_from: str, limit: Limit) -> bytes | None:
        """Return the content of what `find` finds; for small files."""

    def address(self, key: str, size: int) -> Stored:
        """Return a new URL for a file that is known to exist under `key` with `size` bytes. Does not ask the storage."""


class LocalFolder:
    """Files below OUTPUT_DIR, as file:// URLs."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder.resolve()

    def check(self, limit: Limit) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self._folder).close()
        except OSError as error:
            raise NotStored("OUTPUT_DIR cannot be written to; use another folder or a bucket", refused=True) from error

    def put(self, file: Path, key: str, content_type: str, made_from: str, limit: Limit) -> Stored:
        target = self._path(key)
        note = self._note(target)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            note.unlink(missing_ok=True)
            with atomic_write(target) as temporary:
                shutil.copyfile(file, temporary)
            if made_from:
                note.write_text(made_from)
        except OSError as error:
            raise NotStored(f"`{key}` could not be written to OUTPUT_DIR; check its free space", refused=True) from error
        return self._stored(target, key)

    def find(self, key: str, made_from: str, limit: Limit) -> Stored | None:
        target = self._path(key)
        try:
            same = target.is_file() and self._note(target).read_text() == made_from
        except OSError:
            return None
        return self._stored(target, key) if same else None

    def read(self, key: str, made_from: str, limit: Limit) -> bytes | None:
        return self._path(key).read_bytes() if self.find(key, made_from, limit) else None

    def address(self, key: str, size: int) -> Stored:
        return Stored(self._path(key).as_uri(), key, None, size)

    def _path(self, key: str) -> Path:
        try:
            return inside(self._folder, key)
        except ValueError as error:
            raise NotStored("the key leads out of OUTPUT_DIR", refused=True) from error

    @staticmethod
    def _note(target: Path) -> Path:
        """Return the path of the note with `made_from`. The note is written last: a file without it counts as unfinished."""
        return target.with_name(f".{target.name}.made-from")

    @staticmethod
    def _stored(target: Path, key: str) -> Stored:
        return Stored(target.as_uri(), key, None, target.stat().st_size)


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
            endpoint_url = _without_bucket(endpoint_url, name)
            if addressing_style == "auto":
                addressing_style = "virtual" if _host_of(endpoint_url).endswith("amazonaws.com") else "path"
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
                    region_name=region or _region_of(endpoint_url),
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


class S3Config(BaseModel):
    """The `s3Config` that a job can carry beside its `input`."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    access_id: SecretStr = Field(alias="accessId", min_length=1)
    access_secret: SecretStr = Field(alias="accessSecret", min_length=1)
    bucket_name: str = Field(alias="bucketName", pattern=BUCKET_NAME)
    endpoint_url: str = Field(alias="endpointUrl", min_length=1)
    region: str | None = None
    session_token: SecretStr | None = Field(default=None, alias="sessionToken")

    @field_validator("access_id", "access_secret")
    @classmethod
    def _can_sign(cls, value: SecretStr) -> SecretStr:
        if not re.fullmatch("[!-~]+", value.get_secret_value()):
            raise ValueError("no key")
        return value


def storage_of(settings: Settings) -> Storage:
    """Return the bucket if one is configured, else the local folder. Raises SettingsError."""
    if not settings.bucket_name:
        return LocalFolder(settings.output_dir)
    assert settings.bucket_access_key_id and settings.bucket_secret_access_key  # Settings has checked it
    try:
        return Bucket(
            name=settings.bucket_name,
            access_key_id=settings.bucket_access_key_id.get_secret_value(),
            secret_access_key=settings.bucket_secret_access_key.get_secret_value(),
            endpoint_url=settings.bucket_endpoint_url,
            region=settings.bucket_region,
            addressing_style=settings.bucket_addressing_style,
            key_prefix=settings.bucket_key_prefix,
            ttl_seconds=settings.presigned_url_ttl,
            session_token=settings.bucket_session_token.get_secret_value() if settings.bucket_session_token else None,
        )
    except BadBucket as error:
        raise SettingsError(f"BUCKET_{error.field.upper()}: {error.rule}") from None


MAX_S3_FIELDS = 20
"""How many fields a job's `s3Config` may have; more are refused before one is looked at."""


def _s3_fields() -> list[str]:
    return [info.alias or name for name, info in S3Config.model_fields.items()]


def storage_of_job(s3_config: Any, settings: Settings) -> Storage:
    """Return the job's own bucket. It must be at a public address, or in the worker's own store.

    Raises WorkerError with INVALID_INPUT.
    """
    if isinstance(s3_config, dict) and len(s3_config) > MAX_S3_FIELDS:
        text = f"has {len(s3_config)} fields; it takes {', '.join(_s3_fields())}"
        raise WorkerError.of([Problem(Code.INVALID_INPUT, "s3Config", text)])
    try:
        config = S3Config.model_validate(s3_config)
    except ValidationError as error:
        fields = sorted({str(problem["loc"][0]) if problem["loc"] else "" for problem in error.errors()})
        text = (
            "must be valid; s3Config takes accessId, accessSecret, bucketName and endpointUrl (http or https), all strings, "
            "the keys in ASCII without spaces"
        )
        raise WorkerError.of([Problem(Code.INVALID_INPUT, f"s3Config.{name}".rstrip("."), text) for name in fields]) from None
    try:
        return Bucket(
            name=config.bucket_name,
            access_key_id=config.access_id.get_secret_value(),
            secret_access_key=config.access_secret.get_secret_value(),
            endpoint_url=config.endpoint_url,
            region=config.region,
            addressing_style="auto",
            key_prefix=settings.bucket_key_prefix,
            ttl_seconds=settings.presigned_url_ttl,
            session_token=config.session_token.get_secret_value() if config.session_token else None,
            public=not settings.allow_private_downloads and not _is_own_store(config, settings),
        )
    except BadBucket as error:
        name = {"endpoint_url": "endpointUrl"}.get(error.field, error.field)
        raise WorkerError.of([Problem(Code.INVALID_INPUT, f"s3Config.{name}", error.rule)]) from None


def _is_own_store(config: S3Config, settings: Settings) -> bool:
    theirs, ours = config.endpoint_url, settings.bucket_endpoint_url
    return ours is not None and _without_bucket(theirs, config.bucket_name) == _without_bucket(ours, settings.bucket_name or "")


def _without_bucket(endpoint_url: str | None, bucket: str) -> str | None:
    """Return the endpoint without the bucket's name. Other workers want it there, but boto3 would add it again."""
    if endpoint_url is None:
        return None
    endpoint_url = re.sub(rf"^(https?://){re.escape(bucket)}\.", r"\1", endpoint_url.rstrip("/"))
    return endpoint_url.removesuffix(f"/{bucket}")


def _host_of(endpoint_url: str | None) -> str:
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


def _region_of(endpoint_url: str | None) -> str:
    """Return the region in the endpoint's name. R2 needs `auto`; stores such as MinIO accept any."""
    host = _host_of(endpoint_url)
    if host.endswith(".r2.cloudflarestorage.com"):
        return "auto"
    return next((match[1] for pattern in _REGIONS if (match := re.search(pattern, host))), "us-east-1")


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
