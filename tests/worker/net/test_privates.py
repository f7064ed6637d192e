"""With a private name of urllib3 or botocore gone, nothing is sent unguarded, and the worker does not start."""

from __future__ import annotations

import threading
from pathlib import Path

import boto3
import pytest
from botocore.httpsession import URLLib3Session
from urllib3.connection import HTTPConnection
from urllib3.poolmanager import PoolManager

from worker.net import privates
from worker.net.download import fetch_bytes
from worker.net.privates import GuardMissing
from worker.settings import Settings, SettingsError
from worker.startup.cold_start import cold_start


def client():
    return boto3.client(
        "s3", endpoint_url="http://127.0.0.1:1", region_name="auto", aws_access_key_id="a", aws_secret_access_key="b"
    )


def test_with_the_tested_versions_everything_is_guarded() -> None:
    privates.check()
    privates.guard_store(client(), public=True)


@pytest.fixture
def unguarded(monkeypatch: pytest.MonkeyPatch) -> None:
    """urllib3 as if it made its connections by a method of another name."""
    original = HTTPConnection._new_conn
    monkeypatch.setattr(HTTPConnection, "_make_connection", original, raising=False)
    monkeypatch.setattr(HTTPConnection, "connect", lambda self: setattr(self, "sock", self._make_connection()))


@pytest.mark.usefixtures("unguarded")
def test_connections_that_are_made_in_another_way_stop_the_start(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(GuardMissing, match=r"downloads cannot be guarded; install urllib3 2\.8\.0"):
        privates.check()
    settings = Settings(model_id="wan21_1b", checkpoint_dir=tiny, device="cpu", output_dir=tmp_path)
    with pytest.raises(SettingsError, match="downloads cannot be guarded"):
        cold_start(settings)


def test_pools_that_are_chosen_in_another_way_stop_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = PoolManager().pool_classes_by_scheme
    monkeypatch.setattr(
        PoolManager, "pool_classes_by_scheme", property(lambda self: plain, lambda self, _: None), raising=False
    )
    with pytest.raises(GuardMissing):
        privates.check()


@pytest.mark.parametrize("name", ["_proxy_config", "_manager"])
def test_a_botocore_that_has_moved_reaches_no_bucket_of_a_job(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    bucket = client()
    delattr(bucket._endpoint.http_session, name)
    with pytest.raises(GuardMissing, match="a bucket cannot be guarded"):
        privates.guard_store(bucket, public=True)


def test_a_botocore_that_keeps_its_session_elsewhere_reaches_no_bucket_of_a_job() -> None:
    bucket = client()
    bucket._endpoint.http_session = object()
    with pytest.raises(GuardMissing):
        privates.guard_store(bucket, public=True)


def test_a_response_that_is_not_watched_is_not_read(monkeypatch: pytest.MonkeyPatch, web) -> None:
    monkeypatch.setattr(privates, "watched_pools", lambda pools, watch: pools)
    monkeypatch.setattr("worker.net.web.watched_pools", lambda pools, watch: pools)
    with pytest.raises(GuardMissing, match="a slow download cannot be guarded"):
        fetch_bytes(web.gives("/a", b"x"), 10, threading.Event(), private=True)


def test_the_session_of_botocore_is_the_one_that_is_guarded() -> None:
    assert isinstance(client()._endpoint.http_session, URLLib3Session)
