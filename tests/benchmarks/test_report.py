"""What a benchmark has found is printed and kept at once; the page about speed lists every benchmark."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import report

ROOT = Path(__file__).parents[2]


def test_a_row_is_kept_whatever_comes_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "_PACKAGES", ("torch", "not-installed"))
    rows = report.Rows("speed", size="tiny")
    rows.add(way="plain", seconds=2)
    rows.add(way="ours", seconds=1)
    rows.add(way="large", error="out of memory")
    assert capsys.readouterr().out.splitlines()[1:] == [
        "way | seconds",
        "plain | 2",
        "ours | 1",
        "way | error",
        "large | out of memory",
    ]
    (file,) = tmp_path.iterdir()
    kept = json.loads(file.read_text())
    assert [row["way"] for row in kept["rows"]] == ["plain", "ours", "large"]
    assert kept["size"] == "tiny" and kept["versions"]["not-installed"] is None


def test_every_benchmark_is_on_the_page() -> None:
    page = (ROOT / "docs/performance.md").read_text()
    commands = [path.stem for path in (ROOT / "benchmarks").glob("*.py") if "__main__" in path.read_text()]
    assert len(commands) > 10
    assert not [name for name in commands if f"benchmarks.{name} " not in page and f"benchmarks/{name}.py" not in page]
