import pytest

from worker.files import atomic_write


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
