"""The SDK is imported without what takes long, and has all of it when it asks."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tests.worker_process import ROOT

SCRIPT = """
import sys
from worker.runpod import queue
from runpod.serverless.utils.rp_debugger import PROCESSOR
print(PROCESSOR)
print("paramiko.client" in sys.modules)
from runpod.cli.utils import ssh_cmd
print(ssh_cmd.paramiko.SSHClient.__module__, sys.modules["paramiko"].SSHClient is ssh_cmd.paramiko.SSHClient)
"""


def test_the_sdk_knows_the_processor_without_a_probe_and_ssh_when_it_is_used() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True, check=True)
    processor, ssh_at_start, ssh = done.stdout.splitlines()
    name = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    assert processor == (name[1] if name else "Unable to get processor info.")
    assert ssh_at_start == "False"
    assert ssh == "paramiko.client True"
