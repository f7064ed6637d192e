import os
import subprocess
import sys
from pathlib import Path

import pytest

from worker.files import atomic_write

ROOT = Path(__file__).parents[2]


def left_in(folder) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_an_atomic_write_goes_through_a_file_in_the_same_folder(tmp_path):
    with atomic_write(tmp_path / "a") as temporary:
        assert (temporary.parent, left_in(tmp_path)) == (tmp_path, [temporary.name])
    assert left_in(tmp_path) == ["a"]


def test_an_atomic_write_that_fails_leaves_the_older_file(tmp_path):
    target = tmp_path / "a"
    target.write_bytes(b"old")

    def write_half():
        with atomic_write(target) as temporary:
            temporary.write_bytes(b"half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_half()
    assert target.read_bytes() == b"old"
    assert left_in(tmp_path) == ["a"]


def run_with_scratch(tmp_path, *lines: str) -> None:
    """Run these lines in a process of its own, after it has put a file into its scratch folder."""
    start = ["import os", "from pathlib import Path", "from worker.files import scratch"]
    program = "\n".join([*start, "Path(scratch().name, 'half-a-video').touch()", *lines])
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=os.environ | {"TMPDIR": str(tmp_path)}, check=False)


def test_a_process_that_ends_takes_its_scratch_folder_with_it(tmp_path):
    run_with_scratch(tmp_path)
    assert left_in(tmp_path) == []


def test_what_a_killed_process_left_goes_with_the_next_one(tmp_path):
    run_with_scratch(tmp_path, "os.kill(os.getpid(), 9)")
    assert len(left_in(tmp_path)) == 1
    run_with_scratch(tmp_path)
    assert left_in(tmp_path) == []


def test_the_scratch_folder_of_a_running_process_stays(tmp_path):
    (tmp_path / f"worker-wan-lora-{os.getpid()}-abc").mkdir()
    run_with_scratch(tmp_path)
    assert left_in(tmp_path) == [f"worker-wan-lora-{os.getpid()}-abc"]


def test_in_a_container_where_every_worker_has_the_same_number_the_older_folder_goes(tmp_path):
    lines = "older = Path(os.environ['TMPDIR'], f'worker-wan-lora-{os.getpid()}-older')", "older.mkdir()"
    run_with_scratch(tmp_path, *lines, "scratch.cache_clear()", "scratch()", "assert not older.exists()")
    assert left_in(tmp_path) == []
