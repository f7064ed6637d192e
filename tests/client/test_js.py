"""The JavaScript client in Node, against the scripted API of the Python client's tests."""

from __future__ import annotations

import json
import shutil
import subprocess
from typing import Any

import pytest

from tests.client.conftest import REQUEST
from tests.client.endpoint import KEY, Api, Script
from tests.faults import Dropped, Status
from tests.worker_process import ROOT, free_port

NODE = shutil.which("node")
MODULE = ROOT / "client/js/worker-wan-lora.js"

pytestmark = pytest.mark.skipif(NODE is None, reason="no Node; apt-get install nodejs")

_SCRIPT = """
import {{ Client }} from {module};
const seen = [];
const options = {{ pause: 0.01, onProgress: (update) => seen.push(update), ...{options} }};
const client = {client};
let found;
try {{
  found = {{ result: await client.run({request}, options), seen }};
}} catch (error) {{
  found = {{ code: error.code, message: error.message, jobId: error.jobId ?? null, seen }};
}}
console.log(JSON.stringify(found));
"""


def run_in_node(client: str, options: dict[str, Any] | None = None) -> dict[str, Any]:
    """What `client.run` gives, as JSON."""
    values = {"module": MODULE.as_uri(), "options": options or {}, "request": REQUEST}
    script = _SCRIPT.format(client=client, **{name: json.dumps(value) for name, value in values.items()})
    command = [str(NODE), "--input-type=module", "-e", script]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def endpoint(api: Api) -> str:
    options = json.dumps({"baseUrl": api.base_url, "pause": 0.01, "patience": 2})
    return f"Client.endpoint('endpoint', '{KEY}', {options})"


def test_a_run_reports_its_progress_and_gives_the_result(api: Api, script: Script) -> None:
    found = run_in_node(endpoint(api))
    assert [update.get("percent") for update in found["seen"]] == [None, None, 10, 60]
    assert found["seen"][-1]["stage"] == "denoise"
    assert found["result"]["outputs"]["videos"][0]["seed"] == 7
    assert script.submitted[0]["input"] == REQUEST


def test_a_failed_job_has_the_workers_code(api: Api, script: Script) -> None:
    script.answers[:] = [{"status": "FAILED", "error": "LORA_NOT_FOUND: `loras[0].path`: no such file"}]
    found = run_in_node(endpoint(api))
    assert (found["code"], found["jobId"]) == ("LORA_NOT_FOUND", "job-1") and "no such file" in found["message"]


def test_a_lost_answer_while_it_waits_is_asked_for_again(api: Api) -> None:
    api.faults.order("status", Status(502))
    api.faults.order("status", Dropped())
    assert run_in_node(endpoint(api))["result"]["model"] == "wan21_1b"


def test_a_request_whose_answer_was_lost_is_not_sent_again(api: Api) -> None:
    api.faults.order("run", Dropped())
    assert run_in_node(endpoint(api))["code"] == "SUBMISSION_UNKNOWN"
    assert api.times("run") == 1


def test_a_wrong_key_and_no_worker_are_said_and_no_key_is_in_it(api: Api) -> None:
    wrong = run_in_node(endpoint(api).replace(KEY, "another-key"))
    assert wrong["code"] == "NOT_AUTHORIZED" and "another-key" not in json.dumps(wrong)
    nobody = run_in_node(f"Client.local('http://127.0.0.1:{free_port()}', {{ patience: 0 }})")
    assert nobody["code"] == "UNREACHABLE"
