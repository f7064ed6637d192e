import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from worker import files
from worker.files import atomic_write, inside

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


def test_the_scratch_folder_of_a_running_process_stays_whatever_its_number_is(tmp_path):
    """Containers that share a temp folder number their processes alike."""
    run = "subprocess.run([sys.executable, '-c', 'from worker.files import scratch; scratch()'], check=True)"
    run_with_scratch(tmp_path, "import subprocess, sys", run, "assert Path(scratch().name, 'half-a-video').exists(), 'gone'")
    assert left_in(tmp_path) == []


@pytest.mark.parametrize(
    "name", ["../a", "a/../../b", "/a", "a//b", "a/./b", "", ".", "..", "a/", "a\0b", "a\nb", "a\\b", "C:\\a"]
)
def test_a_name_from_elsewhere_that_leads_elsewhere_makes_no_path(tmp_path, name):
    with pytest.raises(ValueError):
        inside(tmp_path, name)


@pytest.mark.parametrize("name", ["a", "a/b.c", ".hidden", "ein Boot/ü.safetensors", "a..b"])
def test_any_other_name_from_elsewhere_makes_one(tmp_path, name):
    assert inside(tmp_path, name) == tmp_path / name


def test_a_temp_folder_whose_file_system_has_no_locks_is_an_error_and_not_an_endless_search(tmp_path, monkeypatch):
    tries = []

    def flock(*_):
        tries.append(1)
        assert len(tries) < 10
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(files.fcntl, "flock", flock)
    with pytest.raises(OSError, match="No locks available"):
        files.scratch.__wrapped__()
