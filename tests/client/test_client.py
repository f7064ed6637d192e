"""The client against an endpoint that fails in every way: what it retries, what it does not, and what it reports."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from client import (
    Client,
    InvalidRequest,
    JobFailed,
    JobNotFound,
    JobStopped,
    NotAuthorized,
    Progress,
    Refused,
    SubmissionUnknown,
    Unreachable,
)
from client import api as calls
from tests.client.conftest import REQUEST, update
from tests.client.endpoint import KEY, Api, Script
from tests.faults import CutShort, Dropped, Fault, Garbage, Slow, Status, Unanswered
from tests.worker.web_server import Web
from tests.worker_process import free_port


def test_a_request_becomes_a_result(client: Client, script: Script) -> None:
    seen: list[Progress] = []
    result = client.run(REQUEST, seen.append)
    assert script.submitted == [{"id": "job-1", "input": REQUEST}]
    assert [progress.status for progress in seen] == ["IN_QUEUE", *["IN_PROGRESS"] * 3, "COMPLETED"]
    assert [progress.percent for progress in seen] == [None, None, 10, 60, None]
    assert (seen[3].stage, seen[3].step, seen[3].steps, seen[3].seconds_left) == ("denoise", 6, 10, 84.2)
    (output,) = result.outputs
    assert (result.job_id, output.kind, output.seed, result.warnings) == ("job-1", "video", 7, ("a word",))


def test_runpods_own_fields_beside_the_input_are_sent(client: Client, script: Script) -> None:
    client.submit({"input": REQUEST, "policy": {"ttl": 60000}, "id": "mine"})
    assert script.submitted == [{"id": "job-1", "input": REQUEST, "policy": {"ttl": 60000}}]


# A connection that fails.


@pytest.mark.parametrize(
    "fault",
    [Status(500), Status(502), Status(429), Status(408), Garbage(), Dropped(), Unanswered(), CutShort(), Slow(0.02)],
    ids=str,
)
def test_a_job_is_followed_through_any_failure(client: Client, api: Api, said: list[str], fault: Fault) -> None:
    api.faults.order("status", fault, times=3)
    assert client.run(REQUEST).outputs
    assert api.faults.met.total() == 3
    assert api.times("run") == 1
    assert len(said) == (0 if isinstance(fault, Slow) else 1)


def test_an_answer_without_a_status_is_retried(client: Client, script: Script) -> None:
    script.answers.insert(0, {"message": "no healthy upstream"})
    assert client.run(REQUEST).outputs


def test_each_outage_is_reported_once(client: Client, api: Api, said: list[str]) -> None:
    job_id = client.submit(REQUEST)
    for _ in range(2):
        api.faults.order("status", Status(502), times=3)
        client.status(job_id)
    assert said == [f"{api.base_url}/endpoint: status 502; retrying"] * 2


def test_the_client_gives_up_on_an_endpoint_that_stays_down_and_names_the_job(api: Api) -> None:
    client = Client.endpoint("endpoint", KEY, base_url=api.base_url, patience=0.4)
    job_id = client.submit(REQUEST)
    api.faults.order("status", Dropped(), times=1000)
    started = time.monotonic()
    with pytest.raises(Unreachable) as caught:
        client.wait(job_id)
    assert caught.value.job_id == job_id
    assert 0.2 < time.monotonic() - started < 5


def test_patience_counts_from_the_last_answer(api: Api, script: Script) -> None:
    client = Client.endpoint("endpoint", KEY, base_url=api.base_url, patience=0.3)
    for _ in range(4):
        api.faults.order("status", Status(502), times=4)  # pauses of 0.15 s together
        api.faults.order("status", Slow(0))
    assert client.run(REQUEST).outputs


@pytest.mark.parametrize(
    ("header", "pause"), [("1", 1), *((none, 0.01) for none in ("junk", "-1", "Wed, 21 Oct 2015 07:28:00 GMT", ""))]
)
def test_retry_after_is_respected(client: Client, api: Api, header: str, pause: float, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(calls.time, "sleep", pauses.append)
    api.retry_after = header
    api.faults.order("run", Status(429))
    client.submit(REQUEST)
    assert pauses == [pytest.approx(pause, rel=0.3)]


def test_without_patience_a_failure_ends_at_once_and_no_retry_is_announced(api: Api, said: list[str]) -> None:
    client = Client.endpoint("endpoint", KEY, base_url=api.base_url, patience=0, say=said.append)
    api.faults.order("status", Status(502))
    with pytest.raises(Unreachable, match="status 502"):
        client.status(client.submit(REQUEST))
    assert (api.times("status"), said) == (1, [])


# A submission.


@pytest.mark.parametrize("fault", [Status(429), Status(503)], ids=str)
def test_a_submission_that_did_not_arrive_is_retried(client: Client, api: Api, script: Script, fault: Fault) -> None:
    api.faults.order("run", fault, times=2)
    client.submit(REQUEST)
    assert len(script.submitted) == 1


@pytest.mark.parametrize(
    "fault", [Unanswered(), CutShort(), Dropped(), Garbage(), Status(500), Status(502), Status(504)], ids=str
)
def test_a_submission_whose_answer_is_lost_is_not_retried_and_the_error_says_so(client: Client, api: Api, fault: Fault) -> None:
    client.wait(client.submit(REQUEST))
    api.faults.order("run", fault)
    with pytest.raises(SubmissionUnknown, match="may run, or it may not"):
        client.submit(REQUEST)
    assert api.times("run") == 2


def test_a_submission_uses_a_new_connection(client: Client, api: Api) -> None:
    """On an open connection that the server has closed meanwhile, it would be lost, and the job might run or not."""
    client.status(client.submit(REQUEST))
    client.submit(REQUEST)
    assert api.ports[2] not in api.ports[:2]


def test_without_a_server_a_submission_is_retried_for_a_while_and_no_job_is_started(said: list[str]) -> None:
    client = Client.local(f"http://127.0.0.1:{free_port()}", patience=0.2, say=said.append)
    with pytest.raises(Unreachable, match="no job was started"):
        client.submit(REQUEST)


# A local API.


def test_a_local_api_has_the_same_calls_without_a_key(api: Api, script: Script) -> None:
    client = Client.local(api.here)
    seen: list[Progress] = []
    assert client.run(REQUEST, seen.append).outputs
    assert [progress.percent for progress in seen] == [None, None, 10, 60, None]
    script.answers = [update(40)]
    assert client.status("job-1").percent == 40
    assert client.cancel("job-1") == "CANCELLED"
    assert all("Authorization" not in headers for _, headers in api.asked)


def test_the_address_of_a_local_api_is_checked() -> None:
    with pytest.raises(Refused, match="localhost:8000 is not an http"):
        Client.local("localhost:8000")


def test_a_local_submission_whose_answer_is_lost_is_not_retried_either(api: Api) -> None:
    api.faults.order("run", Unanswered())
    with pytest.raises(SubmissionUnknown, match="a local worker's log"):
        Client.local(api.here).submit(REQUEST)
    assert api.times("run") == 1


def test_a_local_api_without_a_status_call_is_refused(api: Api) -> None:
    """The local API of RunPod's SDK has no GET /status."""
    client = Client.local(api.here)
    job_id = client.submit(REQUEST)
    api.faults.order("status", Status(405))
    with pytest.raises(Refused, match=r"start it with `python handler.py --rp_serve_api`"):
        client.wait(job_id)


def test_a_local_api_is_called_without_a_proxy(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("NO_PROXY", "")
    assert Client.local(api.here, patience=0.2).submit(REQUEST) == "job-1"


# Final failures.


def test_a_wrong_key_is_reported_at_once_and_not_printed(api: Api) -> None:
    client = Client.endpoint("endpoint", "rpa_WRONG", base_url=api.base_url)
    with pytest.raises(NotAuthorized) as caught:
        client.submit(REQUEST)
    assert "rpa_WRONG" not in str(caught.value)
    assert api.times("run") == 1


@pytest.mark.parametrize("key", ["", "rpa_A\n", "rpa A", "schlüssel"])
def test_a_key_that_cannot_be_valid_is_not_sent(api: Api, key: str) -> None:
    with pytest.raises(NotAuthorized):
        Client.endpoint("endpoint", key, base_url=api.base_url)


def test_an_unknown_endpoint_and_an_unknown_job_have_different_errors(api: Api, client: Client) -> None:
    with pytest.raises(JobNotFound, match="no such endpoint"):
        Client.endpoint("another", KEY, base_url=api.base_url).submit(REQUEST)
    with pytest.raises(JobNotFound, match="30 minutes"):
        client.wait("job-99")


def test_a_job_that_is_not_known_at_once_is_polled_again(client: Client, api: Api) -> None:
    api.faults.order("status", Status(404), times=2)
    assert client.run(REQUEST).outputs


def test_a_refusal_contains_the_servers_reason(client: Client, api: Api) -> None:
    api.faults.order("run", Status(400))
    with pytest.raises(Refused, match="a fault on demand"):
        client.submit(REQUEST)


# The key.


def test_the_key_is_sent_with_calls_and_not_with_downloads(client: Client, api: Api, web: Web, folder: Any) -> None:
    client.download(client.run(REQUEST), folder)
    assert {headers["Authorization"] for _, headers in api.asked} == {f"Bearer {KEY}"}
    assert all("Authorization" not in headers for _, headers in web.requests)


def test_the_key_does_not_follow_a_redirect(client: Client, api: Api) -> None:
    api.faults.order("run", Status(307))
    with pytest.raises(Refused, match="another address"):
        client.submit(REQUEST)
    assert [kind for kind, _ in api.asked] == ["run"]


def test_the_key_is_not_sent_unencrypted() -> None:
    with pytest.raises(Refused, match="unencrypted"):
        Client.endpoint("endpoint", KEY, base_url="http://example.com/v2")


@pytest.mark.parametrize("endpoint_id", ["", "a/b", "../x", "a?b", "a b"])
def test_an_endpoint_id_cannot_be_a_path(endpoint_id: str) -> None:
    with pytest.raises(Refused, match="endpoint's id"):
        Client.endpoint(endpoint_id, KEY)


def test_netrc_is_ignored_and_no_message_contains_the_key(
    client: Client, api: Api, web: Web, folder: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login someone password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    api.faults.order("status", Dropped())
    client.download(client.run(REQUEST), folder)
    assert {headers["Authorization"] for _, headers in api.asked} == {f"Bearer {KEY}"}
    assert all("Authorization" not in headers for _, headers in web.requests)
    assert KEY not in "".join(said)


def test_a_key_that_the_server_repeats_is_in_no_error(client: Client, script: Script) -> None:
    script.answers = [{"status": "FAILED", "error": f"INTERNAL: Bearer {KEY} is not welcome"}]
    with pytest.raises(JobFailed, match="is not welcome") as caught:
        client.run(REQUEST)
    assert KEY not in str(caught.value)


# How a job ends.


def test_a_failed_job_has_the_workers_code(client: Client, script: Script) -> None:
    script.answers = [{"status": "FAILED", "error": "OUT_OF_MEMORY: the video is too large"}]
    with pytest.raises(JobFailed) as caught:
        client.run(REQUEST)
    assert (caught.value.code, caught.value.job_id) == ("OUT_OF_MEMORY", "job-1")
    assert str(caught.value) == "OUT_OF_MEMORY: the video is too large"


@pytest.mark.parametrize(
    ("error", "text"),
    [
        ('{"error_type": "E", "error_message": "it broke", "error_traceback": "File /secret"}', "it broke"),
        ("job timed out after 1 retries", "job timed out after 1 retries"),
        (None, "RunPod gives no reason; look at the worker's log"),
        ({"a": 1}, "{'a': 1}"),
    ],
)
def test_a_failure_without_a_code_is_an_error_too(client: Client, script: Script, error: Any, text: str) -> None:
    script.answers = [{"status": "FAILED", "error": error}]
    with pytest.raises(JobFailed) as caught:
        client.run(REQUEST)
    assert (caught.value.code, str(caught.value)) == ("JOB_FAILED", text)


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ({"status": "CANCELLED"}, "CANCELLED"),
        ({"status": "TIMED_OUT"}, "TIMEOUT"),
        ({"status": "FAILED", "error": "TIMEOUT: the job took longer than 570 s"}, "TIMEOUT"),
    ],
)
def test_a_job_that_was_stopped_has_another_error_than_one_that_failed(
    client: Client, script: Script, answer: dict[str, Any], code: str
) -> None:
    script.answers = [answer]
    with pytest.raises(JobStopped) as caught:
        client.run(REQUEST)
    assert caught.value.code == code


def test_the_error_for_a_lost_result_says_where_the_files_may_be(client: Client, script: Script) -> None:
    script.answers = [{"status": "COMPLETED"}]
    with pytest.raises(JobFailed, match="bucket, below job-1/"):
        client.run(REQUEST)


@pytest.mark.parametrize("output", [[], "text", {}, {"model": "x", "outputs": {"images": [], "videos": [{}]}}])
def test_the_result_of_another_worker_is_an_error(client: Client, script: Script, output: Any) -> None:
    script.answers = [{"status": "COMPLETED", "output": output}]
    with pytest.raises(JobFailed, match="another worker"):
        client.run(REQUEST)


def test_a_job_can_be_cancelled_through_failures(client: Client, api: Api) -> None:
    job_id = client.submit(REQUEST)
    api.faults.order("cancel", Unanswered())
    api.faults.order("cancel", Status(500))
    assert client.cancel(job_id) == "CANCELLED"
    with pytest.raises(JobStopped):
        client.wait(job_id)


def test_an_invalid_request_is_not_sent(client: Client, api: Api) -> None:
    with pytest.raises(InvalidRequest) as caught:
        client.submit({**REQUEST, "prompts": [{"prompt": "a boat", "width": 32, "stesp": 3}]})
    assert len(caught.value.problems) == 2
    assert api.asked == []


def test_pauses_grow_and_stay_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(calls, "_FIRST_PAUSE", 0.5)
    monkeypatch.setattr(calls.time, "sleep", pauses.append)
    retry = calls.Retry(100, [].append)
    for _ in range(12):
        assert retry.wait("away")
    assert pauses[0] < 0.7 < pauses[4]
    assert max(pauses) <= 30 * 1.25


@pytest.mark.parametrize("key_in_json", [KEY, "".join(f"\\u{ord(letter):04x}" for letter in KEY)])
def test_a_key_that_a_server_repeats_in_escapes_is_not_in_the_answer(client: Client, api: Api, key_in_json: str) -> None:
    """As a server writes it that wants to see it in a log."""
    answer = json.loads(f'{{"status": "FAILED", "error": "{key_in_json}"}}')
    assert KEY in answer["error"]

    class Response:
        content = f'{{"status": "FAILED", "error": "{key_in_json}"}}'.encode()

    assert client._api._json(Response()) == {"status": "FAILED", "error": "***"}  # type: ignore[arg-type]


def test_a_status_that_runpod_does_not_have_is_not_polled_for_ever(api: Api, script: Script) -> None:
    client = Client.endpoint("endpoint", KEY, base_url=api.base_url, patience=0.3)
    script.answers = [{"status": "IN_PROGRESS"}, {"status": "PAUSED\x1b[2J"}]
    with pytest.raises(Unreachable, match=r"the status 'PAUSED\\x1b\[2J' is not one of RunPod's"):
        client.wait(client.submit(REQUEST))


def test_an_update_of_another_worker_is_no_progress() -> None:
    update = {"stage": ["\x1b[2J"], "percent": "much"}
    assert Progress.of("a", {"status": "IN_PROGRESS", "output": update}) == Progress("a", "IN_PROGRESS")
