"""A short soak; `make soak` is the long one."""

from __future__ import annotations

from pathlib import Path

from tests.soak import soak


def test_two_dozen_jobs_survive_faults_and_the_death_of_a_worker(tiny: Path, tmp_path: Path) -> None:
    findings = soak({"wan21_1b": 22}, 1, tiny, tmp_path)
    assert findings.violations == [], str(findings)
    counted = ("workers killed", "times the bucket was away", "jobs delivered twice", "jobs stopped", "cached LoRAs damaged")
    assert all(findings.figures[name] for name in counted), str(findings)
