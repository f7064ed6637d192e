"""Chooses where files go: the bucket of the job, the bucket of the worker, or the local folder."""

from __future__ import annotations

import re
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator

from worker.errors import Code, Problem, WorkerError
from worker.settings import BUCKET_NAME, Settings, SettingsError
from worker.storage.base import Storage
from worker.storage.bucket import BadBucket, Bucket
from worker.storage.endpoint import without_bucket
from worker.storage.local_folder import LocalFolder


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


def storage_of_job(s3_config: Any, settings: Settings) -> Storage:
    """Return the job's own bucket. It must be at a public address, or in the worker's own store.

    Raises WorkerError with INVALID_INPUT.
    """
    if isinstance(s3_config, dict) and len(s3_config) > MAX_S3_FIELDS:
        fields = [info.alias or name for name, info in S3Config.model_fields.items()]
        text = f"has {len(s3_config)} fields; it takes {', '.join(fields)}"
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
    return ours is not None and without_bucket(theirs, config.bucket_name) == without_bucket(ours, settings.bucket_name or "")
