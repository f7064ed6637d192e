import re
import threading
import time
from urllib.parse import urlsplit

import pytest
import requests
from botocore.exceptions import ClientError
from botocore.retries.standard import ExponentialBackoff

from tests.faults import Status
from tests.s3_server import Gateway, S3Server
from worker.errors import Code, WorkerError
from worker.net.addresses import NotPublic
from worker.settings import Settings, SettingsError, load_settings
from worker.storage.base import Limit, NotStored
from worker.storage.bucket import Bucket
from worker.storage.choice import storage_of, storage_of_job
from worker.storage.endpoint import region_of, without_bucket
from worker.storage.local_folder import LocalFolder

LIMIT = Limit(threading.Event())


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    """botocore waits seconds before it asks a dead endpoint again."""
    monkeypatch.setattr(ExponentialBackoff, "delay_amount", lambda *_: 0.0)


@pytest.fixture
def file(tmp_path):
    file = tmp_path / "0.mp4"
    file.write_bytes(b"a finished video")
    return file


@pytest.fixture
def gateway(s3):
    gateway = Gateway(s3)
    yield gateway
    gateway.close()


KEYS = {
    "bucket_endpoint_url": "https://s3.example.com",
    "bucket_name": "videos",
    "bucket_access_key_id": "id",
    "bucket_secret_access_key": "secret",
}


def settings_for(server: S3Server | None = None, **others) -> Settings:
    bucket = {name.lower(): value for name, value in server.environment().items()} if server else {}
    return Settings(**{"model_id": "wan21_1b"} | bucket | others)


def upload_failure(storage, file) -> str:
    with pytest.raises(WorkerError) as caught:
        storage.put(file, "job/0.mp4", "video/mp4", "sum", LIMIT)
    assert caught.value.code is Code.UPLOAD_FAILED
    return str(caught.value)


# The worker's bucket


def test_the_url_of_an_upload_gives_the_file_back(s3, file):
    stored = storage_of(settings_for(s3)).put(file, "job/0.mp4", "video/mp4", "sum", LIMIT)
    answer = requests.get(stored.url, timeout=10)
    assert (answer.status_code, answer.content) == (200, b"a finished video")
    assert answer.headers["Content-Type"] == "video/mp4"
    assert answer.headers["Content-Length"] == "16"


def test_a_part_of_the_file_can_be_asked_for_as_players_do(s3, file):
    stored = storage_of(settings_for(s3)).put(file, "job/0.mp4", "video/mp4", "sum", LIMIT)
    answer = requests.get(stored.url, headers={"Range": "bytes=2-9"}, timeout=10)
    assert (answer.status_code, answer.content) == (206, b"finished")


def test_a_large_file_comes_back_whole(s3, file):
    body = bytes(range(256)) * 4096 * 10  # 10 MiB: sent in parts
    file.write_bytes(body)
    stored = storage_of(settings_for(s3)).put(file, "job/large.mp4", "video/mp4", "sum", LIMIT)
    answer = requests.get(stored.url, timeout=20)
    assert answer.content == body
    assert answer.headers["Content-Type"] == "video/mp4"


def test_an_upload_lies_in_the_bucket_under_its_key(s3, file):
    stored = storage_of(settings_for(s3)).put(file, "job-1/0.mp4", "video/mp4", "sum", LIMIT)
    assert stored.key == "job-1/0.mp4"
    assert s3.client().get_object(Bucket=s3.bucket, Key="job-1/0.mp4")["Body"].read() == b"a finished video"


@pytest.mark.parametrize("prefix", ["videos/", "a b/ü+/"])
def test_the_key_prefix_is_put_before_the_key(s3, file, prefix):
    stored = storage_of(settings_for(s3, bucket_key_prefix=prefix)).put(file, "job/0.mp4", "video/mp4", "sum", LIMIT)
    assert stored.key == f"{prefix}job/0.mp4"
    assert requests.get(stored.url, timeout=10).content == b"a finished video"


def test_a_second_upload_replaces_the_first(s3, file):
    storage = storage_of(settings_for(s3))
    storage.put(file, "job/again.mp4", "video/mp4", "sum", LIMIT)
    file.write_bytes(b"newer")
    assert requests.get(storage.put(file, "job/again.mp4", "video/mp4", "sum", LIMIT).url, timeout=10).content == b"newer"


def test_the_url_says_when_it_ends(s3, file):
    before = time.time()
    stored = storage_of(settings_for(s3, presigned_url_ttl=3600)).put(file, "job/0.mp4", "video/mp4", "sum", LIMIT)
    assert "X-Amz-Expires=3600" in stored.url and "X-Amz-Algorithm=AWS4-HMAC-SHA256" in stored.url
    end = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(before + 3600))
    assert end <= stored.expires_at <= time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + 3601))


def test_a_url_that_has_run_out_is_refused(s3, file):
    storage = Bucket(s3.bucket, s3.access_key_id, s3.secret_access_key, s3.endpoint_url, None, "auto", "", ttl_seconds=1)
    url = storage.put(file, "job/0.mp4", "video/mp4", "sum", LIMIT).url
    time.sleep(2.1)
    assert requests.get(url, timeout=10).status_code == 403


@pytest.mark.parametrize(
    ("old", "new"), [("0.mp4", "1.mp4"), ("Expires=86400", "Expires=99999"), ("Signature=", "Signature=0")]
)
def test_a_url_that_was_changed_is_refused(s3, file, old, new):
    storage = storage_of(settings_for(s3))
    storage.put(file, "job/1.mp4", "video/mp4", "sum", LIMIT)
    url = storage.put(file, "job/0.mp4", "video/mp4", "sum", LIMIT).url
    assert old in url
    assert requests.get(url.replace(old, new), timeout=10).status_code == 403


def test_without_the_signature_nothing_is_given(s3, file):
    url = storage_of(settings_for(s3)).put(file, "job/0.mp4", "video/mp4", "sum", LIMIT).url
    assert requests.get(url.partition("?")[0], timeout=10).status_code == 403


@pytest.mark.parametrize(
    "wrong",
    [
        {"bucket_secret_access_key": "wrong-secret"},
        {"bucket_access_key_id": "wrong-id"},
        {"bucket_name": "no-such-bucket"},
        {"bucket_endpoint_url": "http://127.0.0.1:1"},
    ],
    ids=lambda wrong: " ".join(wrong.values()),
)
def test_a_bucket_that_takes_nothing_fails_without_its_host_and_keys_in_the_error(s3, file, wrong):
    text = upload_failure(storage_of(settings_for(s3, **wrong)), file)
    assert "`job/0.mp4`" in text and "check its name, endpoint, region, keys and permissions" in text
    host = urlsplit(wrong.get("bucket_endpoint_url", s3.endpoint_url)).hostname
    for secret in (host, s3.access_key_id, s3.secret_access_key, *wrong.values()):
        assert secret not in text


def test_the_error_has_the_reason_of_the_store(s3, file):
    assert "accept `job/0.mp4` (NoSuchBucket);" in upload_failure(
        storage_of(settings_for(s3, bucket_name="no-such-bucket")), file
    )
    assert "accept `job/0.mp4` (SignatureDoesNotMatch);" in upload_failure(
        storage_of(settings_for(s3, bucket_secret_access_key="wrong")), file
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("BUCKET_ENDPOINT_URL", "s3.example.com"),
        ("BUCKET_ENDPOINT_URL", "ftp://s3.example.com"),
        ("BUCKET_ENDPOINT_URL", "https:///"),
        ("BUCKET_ENDPOINT_URL", "https://user:s3cr3t@s3.example.com"),
        ("BUCKET_ENDPOINT_URL", "http://127.0.0.1:0"),
        ("BUCKET_ENDPOINT_URL", "https://[1.2.3.4]"),
        ("BUCKET_ENDPOINT_URL", "https://["),
        ("BUCKET_ENDPOINT_URL", "https://a host"),
        ("BUCKET_ENDPOINT_URL", "http://127.0.0.1:99999"),
        ("BUCKET_ENDPOINT_URL", "https://[:::::]"),
        ("BUCKET_ENDPOINT_URL", "https://s3..example.com"),
        ("BUCKET_ENDPOINT_URL", f"https://{'a' * 64}.example.com"),
        ("BUCKET_ENDPOINT_URL", "https://-s3.example.com"),
        ("BUCKET_REGION", "no region!"),
    ],
)
def test_a_bucket_setting_that_can_never_work_stops_the_worker_at_start_with_one_line(s3, monkeypatch, name, value):
    for variable, good in {"MODEL_ID": "wan21_1b", **s3.environment(), name: value}.items():
        monkeypatch.setenv(variable, good)
    with pytest.raises((SettingsError, WorkerError)) as caught:
        storage_of(load_settings())
    assert str(caught.value).startswith(f"{name}: ") and "\n" not in str(caught.value)
    assert value not in str(caught.value)


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9000", "https://[::1]:9000/path", "http://minio", "http://minio:65535"])
def test_every_http_endpoint_is_taken(s3, endpoint):
    assert storage_of(settings_for(s3, bucket_endpoint_url=endpoint))


# The bucket of a job


def s3_config(server: S3Server, **changes) -> dict:
    return {
        "accessId": server.access_key_id,
        "accessSecret": server.secret_access_key,
        "bucketName": server.bucket,
        "endpointUrl": server.endpoint_url,
    } | changes


def test_a_job_can_bring_its_own_bucket(s3, file, tmp_path):
    storage = storage_of_job(s3_config(s3), settings_for(allow_private_downloads=True, output_dir=tmp_path / "output"))
    stored = storage.put(file, "job/own.mp4", "video/mp4", "sum", LIMIT)
    assert requests.get(stored.url, timeout=10).content == b"a finished video"
    assert not (tmp_path / "output").exists()


def test_the_bucket_of_a_job_goes_before_that_of_the_worker(s3, file):
    storage = storage_of_job(s3_config(s3), settings_for(s3, bucket_name="of-the-worker", bucket_key_prefix="p/"))
    stored = storage.put(file, "job/0.mp4", "video/mp4", "sum", LIMIT)
    assert f"/{s3.bucket}/p/job/0.mp4?" in stored.url
    assert requests.get(stored.url, timeout=10).status_code == 200


@pytest.mark.parametrize("name", ["accessId", "accessSecret", "bucketName", "endpointUrl"])
@pytest.mark.parametrize("value", ["", None, 5, ["S3cr3t"]])
def test_a_wrong_field_of_s3config_is_named_and_nothing_is_repeated(s3, name, value):
    with pytest.raises(WorkerError) as caught:
        storage_of_job(s3_config(s3, **{name: value}), settings_for())
    assert [(problem.code, problem.field) for problem in caught.value.problems] == [(Code.INVALID_INPUT, f"s3Config.{name}")]
    assert not any(secret in str(caught.value) for secret in (s3.access_key_id, s3.secret_access_key, "127.0.0.1", "S3cr3t"))


def test_every_missing_field_of_s3config_is_named():
    with pytest.raises(WorkerError) as caught:
        storage_of_job({"bucketName": "videos"}, settings_for())
    assert [problem.field for problem in caught.value.problems] == [
        *["s3Config.accessId", "s3Config.accessSecret", "s3Config.endpointUrl"]
    ]


@pytest.mark.parametrize("value", ["text", ["a"], 5, True])
def test_an_s3config_that_is_no_object_is_invalid_input(value):
    with pytest.raises(WorkerError) as caught:
        storage_of_job(value, settings_for())
    assert (caught.value.code, caught.value.problems[0].field) == (Code.INVALID_INPUT, "s3Config")


@pytest.mark.parametrize("endpoint", ["s3.example.com", "ftp://s3.example.com", "file:///tmp", "https://"])
def test_the_endpoint_of_s3config_must_be_http(s3, endpoint):
    with pytest.raises(WorkerError) as caught:
        storage_of_job(s3_config(s3, endpointUrl=endpoint), settings_for())
    assert caught.value.problems[0].field == "s3Config.endpointUrl"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("endpointUrl", "https://["),
        ("endpointUrl", "http://127.0.0.1:99999"),
        ("endpointUrl", "https://[:::::]"),
        ("endpointUrl", "https://s3..example.com"),
        ("endpointUrl", "https://a host"),
        ("region", "no region!"),
        ("bucketName", "Not A Bucket"),
        ("accessSecret", "a\ud800"),
        ("accessId", "two words"),
    ],
)
def test_an_s3config_that_can_never_work_is_refused_before_the_gpu_runs(s3, name, value):
    with pytest.raises(WorkerError) as caught:
        storage_of_job(s3_config(s3, **{name: value}), settings_for())
    assert caught.value.problems[0].field == f"s3Config.{name}"


# Endpoints


@pytest.mark.parametrize(
    "endpoint",
    [
        "https://s3.example.com",
        "https://s3.example.com/",
        "https://s3.example.com/videos",
        "https://s3.example.com/videos/",
        "https://videos.s3.example.com",
        "https://videos.s3.example.com/",
    ],
)
def test_the_name_of_the_bucket_is_taken_out_of_the_endpoint(endpoint):
    assert without_bucket(endpoint, "videos") == "https://s3.example.com"


@pytest.mark.parametrize(
    "endpoint",
    ["https://s3.example.com", "https://s3.example.com/my-videos", "https://my-videos.s3.example.com", "http://127.0.0.1:9000"],
)
def test_what_only_looks_like_the_bucket_stays_in_the_endpoint(endpoint):
    assert without_bucket(endpoint, "videos") == endpoint


def test_an_upload_works_with_the_bucket_in_the_endpoint(s3, file):
    storage = storage_of(settings_for(s3, bucket_endpoint_url=f"{s3.endpoint_url}/{s3.bucket}"))
    assert requests.get(storage.put(file, "job/0.mp4", "video/mp4", "sum", LIMIT).url, timeout=10).status_code == 200


@pytest.mark.parametrize(
    ("endpoint", "region"),
    [
        (None, "us-east-1"),
        ("https://s3.amazonaws.com", "us-east-1"),
        ("https://s3.eu-central-1.amazonaws.com", "eu-central-1"),
        ("https://s3-us-west-2.amazonaws.com", "us-west-2"),
        ("https://s3.us-west-004.backblazeb2.com", "us-west-004"),
        ("https://s3.eu-central-2.wasabisys.com", "eu-central-2"),
        ("https://s3.wasabisys.com", "us-east-1"),
        ("https://0123abc.r2.cloudflarestorage.com", "auto"),
        ("https://s3.dualstack.eu-west-1.amazonaws.com", "eu-west-1"),
        ("https://s3-fips.us-gov-west-1.amazonaws.com", "us-gov-west-1"),
        ("https://videos.s3.eu-north-1.amazonaws.com", "eu-north-1"),
        ("https://s3.fr-par.scw.cloud", "fr-par"),
        ("https://s3.gra.io.cloud.ovh.net", "gra"),
        ("https://fra1.digitaloceanspaces.com", "fra1"),
        ("https://videos.fra1.digitaloceanspaces.com", "fra1"),
        ("https://us-east-1.linodeobjects.com", "us-east-1"),
        ("https://eu-central-1.linodeobjects.com", "eu-central-1"),
        ("https://s3api-eu-ro-1.runpod.io", "eu-ro-1"),
        ("https://cos.ap-guangzhou.myqcloud.com", "ap-guangzhou"),
        ("https://oss-cn-hangzhou.aliyuncs.com", "cn-hangzhou"),
        ("https://minio.example.com:9000", "us-east-1"),
        ("http://127.0.0.1:9000", "us-east-1"),
    ],
)
def test_the_region_is_read_off_the_endpoint(endpoint, region):
    assert region_of(endpoint) == region


# The check at start


def test_the_check_leaves_nothing_in_the_bucket(s3):
    storage_of(settings_for(s3, bucket_key_prefix="checked/")).check(LIMIT)
    assert s3.keys("checked/") == []


@pytest.mark.parametrize("status", [400, 403])
def test_a_store_that_takes_files_and_refuses_their_presigned_urls_fails_the_check(s3, gateway, status):
    gateway.faults.order("GET", Status(status))
    with pytest.raises(NotStored, match=rf"through a presigned URL \(.*{status}.*GetObject.*RunPod's own S3 API") as caught:
        storage_of(settings_for(s3, bucket_endpoint_url=gateway.endpoint_url)).check(LIMIT)
    assert caught.value.refused
    assert "127.0.0.1" not in str(caught.value) and "Signature" not in str(caught.value)


def test_a_session_token_is_sent_and_signed(file, monkeypatch):
    storage = storage_of(settings_for(**KEYS, bucket_session_token=" t0ken\n"))
    monkeypatch.setattr(storage._client, "upload_file", lambda *_, **__: None)
    assert "X-Amz-Security-Token=t0ken&" in storage.put(file, "0.mp4", "video/mp4", "sum", LIMIT).url


def test_a_job_can_bring_keys_with_a_session_token(s3, file, monkeypatch):
    storage = storage_of_job(s3_config(s3, sessionToken="t0ken"), settings_for(allow_private_downloads=True))
    monkeypatch.setattr(storage._client, "upload_file", lambda *_, **__: None)
    assert "X-Amz-Security-Token=t0ken&" in storage.put(file, "0.mp4", "video/mp4", "sum", LIMIT).url


def test_keys_that_were_pasted_with_a_line_end_are_taken(s3):
    pasted = f"{s3.secret_access_key}\n"
    storage_of(settings_for(s3, bucket_access_key_id=f" {s3.access_key_id}", bucket_secret_access_key=pasted)).check(LIMIT)


@pytest.mark.parametrize(("seconds", "says"), [(600, "ahead of"), (-600, "behind")])
def test_a_clock_that_is_off_is_told_at_start(s3, monkeypatch, caplog, seconds, says):
    storage = storage_of(settings_for(s3, presigned_url_ttl=300))
    monkeypatch.setattr("worker.storage.bucket.time.time", lambda now=time.time: now() + seconds)
    storage.check(LIMIT)
    (line,) = [record.message for record in caplog.records if "clock" in record.message]
    assert re.search(rf"the worker's clock is (599|600|601) s {says} the bucket's, and URLs are valid for 300 s", line)


def test_a_clock_that_is_right_is_not_worth_a_line(s3, caplog):
    storage_of(settings_for(s3)).check(LIMIT)
    assert not [record for record in caplog.records if "clock" in record.message]


# Where the URL points, without an upload: presigning needs no network


@pytest.mark.parametrize(
    ("endpoint", "style", "start"),
    [
        (None, "auto", "https://videos.s3.eu-west-1.amazonaws.com/"),
        ("https://s3.eu-west-1.amazonaws.com", "auto", "https://videos.s3.eu-west-1.amazonaws.com/"),
        ("https://videos.s3.eu-west-1.amazonaws.com", "auto", "https://videos.s3.eu-west-1.amazonaws.com/"),
        ("https://store.example.com", "auto", "https://store.example.com/videos/"),
        ("https://store.example.com", "virtual", "https://videos.store.example.com/"),
        ("https://s3.eu-west-1.amazonaws.com", "path", "https://s3.eu-west-1.amazonaws.com/videos/"),
    ],
)
def test_the_bucket_is_in_the_host_on_aws_and_in_the_path_elsewhere(monkeypatch, file, endpoint, style, start):
    bucket = Bucket("videos", "id", "secret", endpoint, "eu-west-1", style, "", 60)
    monkeypatch.setattr(bucket._client, "upload_file", lambda *_, **__: None)
    url = bucket.put(file, "job/0.mp4", "video/mp4", "sum", LIMIT).url
    assert url.startswith(f"{start}job/0.mp4?")
    assert "%2Feu-west-1%2Fs3%2Faws4_request" in url


# A local folder


def test_without_a_bucket_results_go_to_the_local_folder(file, tmp_path):
    stored = storage_of(settings_for(output_dir=tmp_path / "output")).put(file, "job/0.mp4", "video/mp4", "sum", LIMIT)
    target = tmp_path / "output" / "job" / "0.mp4"
    assert (stored.url, stored.key, stored.expires_at) == (target.as_uri(), "job/0.mp4", None)
    assert target.read_bytes() == b"a finished video"
    assert target.stat().st_mode & 0o777 == 0o644


def test_a_relative_folder_gives_an_absolute_url(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stored = storage_of(settings_for()).put(file, "job/0.mp4", "video/mp4", "sum", LIMIT)
    assert stored.url == (tmp_path / "output" / "job" / "0.mp4").as_uri()


def test_the_file_that_was_made_stays_where_it_is(file, tmp_path):
    LocalFolder(tmp_path / "output").put(file, "job/0.mp4", "video/mp4", "sum", LIMIT)
    assert file.exists()


def test_an_older_result_is_replaced_as_a_whole(file, tmp_path):
    target = tmp_path / "output" / "job" / "0.mp4"
    target.parent.mkdir(parents=True)
    target.write_bytes(b"an older and longer video that someone watches")
    with target.open("rb") as watching:
        LocalFolder(tmp_path / "output").put(file, "job/0.mp4", "video/mp4", "sum", LIMIT)
        assert watching.read() == b"an older and longer video that someone watches"
    assert target.read_bytes() == b"a finished video"
    assert {path.name for path in target.parent.iterdir()} == {"0.mp4", ".0.mp4.made-from"}


def test_a_folder_that_cannot_be_written_stops_the_worker_at_start(tmp_path):
    (tmp_path / "output").write_bytes(b"a file in the way")
    with pytest.raises(NotStored, match=r"^UPLOAD_FAILED: OUTPUT_DIR cannot be written to"):
        storage_of(settings_for(output_dir=tmp_path / "output")).check(LIMIT)


def test_a_folder_that_can_no_longer_be_written_is_an_upload_that_failed(file, tmp_path):
    storage = LocalFolder(tmp_path / "output")
    storage.check(LIMIT)
    (tmp_path / "output" / "job").write_bytes(b"a file in the way")
    text = upload_failure(storage, file)
    assert "OUTPUT_DIR" in text and str(tmp_path) not in text


def test_a_result_that_vanishes_while_it_is_looked_at_is_none(file, tmp_path, monkeypatch):
    """Someone cleans the folder up."""
    storage, stored = LocalFolder(tmp_path / "output"), LocalFolder._stored

    def vanish(target, key):
        target.unlink()
        return stored(target, key)

    storage.put(file, "job/0.mp4", "video/mp4", "sum", LIMIT)
    monkeypatch.setattr(LocalFolder, "_stored", staticmethod(vanish))
    assert storage.find("job/0.mp4", "sum", LIMIT) is None
    assert "OUTPUT_DIR" in upload_failure(storage, file)
    monkeypatch.setattr(storage, "find", lambda *_: "it was there")
    assert storage.read("job/0.mp4", "sum", LIMIT) is None


# Addresses that a job may not reach


def test_an_s3config_of_many_fields_is_refused_before_they_are_looked_at(s3):
    with pytest.raises(
        WorkerError, match=r"^INVALID_INPUT: `s3Config`: has 300005 fields; it takes accessId, accessSecret, bu"
    ):
        storage_of_job(s3_config(s3) | {str(number): "x" for number in range(300_001)}, settings_for())


@pytest.mark.parametrize("call", ["check", "put", "find", "read"])
def test_a_job_cannot_send_the_worker_into_its_own_network(s3, file, call):
    storage = storage_of_job(s3_config(s3), settings_for())
    calls = {
        "check": lambda: storage.check(LIMIT),
        "put": lambda: storage.put(file, "private/0.mp4", "video/mp4", "sum", LIMIT),
        "find": lambda: storage.find("private/0.mp4", "sum", LIMIT),
        "read": lambda: storage.read("private/0.mp4", "sum", LIMIT),
    }
    if call in ("find", "read"):
        assert calls[call]() is None
    else:
        with pytest.raises(NotPublic if call == "check" else NotStored):
            calls[call]()
    with pytest.raises(ClientError):
        s3.client().head_object(Bucket=s3.bucket, Key="private/0.mp4")


def test_a_job_may_use_a_bucket_in_the_workers_own_store(s3):
    storage_of_job(s3_config(s3), settings_for(s3)).check(LIMIT)


def test_on_a_local_machine_a_job_may_use_a_local_store(s3):
    storage_of_job(s3_config(s3), settings_for(allow_private_downloads=True)).check(LIMIT)
