"""`python -m builder.fetch_toolkit`: a few files of one commit of ai-toolkit, from real git remotes."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from builder import REPRODUCIBLE_MTIME, fetch_toolkit, retry
from pipelines import toolkit
from pipelines.facts import commit_of, toolkit_version
from pipelines.toolkit import load_toolkit
from tests.conftest import STAND_IN
from tests.worker import web_server

PIPELINE, UTILS = (f"{module.replace('.', '/')}.py" for module in fetch_toolkit.MODULES)

Run = Callable[..., tuple[int, str]]


def git(folder: Path, *arguments: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    return subprocess.run(
        ["git", "-C", str(folder), *who, *arguments], check=True, capture_output=True, text=True
    ).stdout.strip()


@pytest.fixture(scope="module")
def remote(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A repo with the stand-in among much else, and the commit before its last."""
    folder = tmp_path_factory.mktemp("remote")
    shutil.copytree(STAND_IN, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "version.py").write_text('VERSION = "0.1.2"\n')
    (folder / "LICENSE").write_text("MIT")
    (folder / "run.py").write_text("import toolkit.trainer\n")
    (folder / "toolkit/trainer.py").write_text("raise ImportError('the trainer')\n")
    (folder / "toolkit/deep").mkdir()
    (folder / "toolkit/deep/__init__.py").write_text("from .one import ONE\n")
    (folder / "toolkit/deep/one.py").write_text("from toolkit.deep import two\nONE = two.TWO / 2\n")
    (folder / "toolkit/deep/two.py").write_text("TWO = 2.0\n")
    with (folder / UTILS).open("a") as file:
        file.write("\n\ndef half():\n    from ...deep.one import ONE\n\n    return ONE / 2\n")
    git(folder, "init", "-q", "-b", "main")
    git(folder, "config", "uploadpack.allowFilter", "true")
    git(folder, "config", "uploadpack.allowAnySHA1InWant", "true")
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", "one")
    commit = git(folder, "rev-parse", "HEAD")
    (folder / UTILS).write_text("raise ImportError('another commit')\n")
    git(folder, "commit", "-q", "-a", "-m", "two")
    git(folder, "tag", "-a", "-m", "a tag", "v1", commit)
    return folder, commit


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.setattr(retry, "_FIRST_PAUSE", 0.001)

    def call(remote: str, commit: str, to: Path = tmp_path / "toolkit") -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["fetch_toolkit", "--to", str(to), "--remote", remote, "--commit", commit])
        status = fetch_toolkit.main()
        said = capsys.readouterr()
        return status, said.out + said.err

    return call


@pytest.mark.parametrize("filters", ["true", "false"])
def test_the_commits_files_that_are_used_are_fetched_and_load(
    filters: str, remote: tuple[Path, str], run: Run, tmp_path: Path
) -> None:
    folder, commit = remote
    git(folder, "config", "uploadpack.allowFilter", filters)
    to = tmp_path / "toolkit"
    to.mkdir()
    assert run(folder.as_uri(), commit)[0] == 0
    deep = {f"toolkit/deep/{name}.py" for name in ("__init__", "one", "two")}
    files = {str(path.relative_to(to)) for path in to.rglob("*") if path.is_file()}
    assert files == {PIPELINE, UTILS, "toolkit/basic.py", *deep, "version.py", "LICENSE", ".git/HEAD"}
    load_toolkit(to, commit)
    assert sys.modules["toolkit.models.wan21.wan_utils"].half() == 0.5
    assert (commit_of(to), toolkit_version(to)) == (commit, "0.1.2")


def test_fetching_again_leaves_the_same_to_the_second(remote: tuple[Path, str], run: Run, tmp_path: Path) -> None:
    folder, commit = remote
    for to in (tmp_path / "one", tmp_path / "two", tmp_path / "two"):
        assert run(folder.as_uri(), commit, to)[0] == 0
    one, two = (
        {path.relative_to(to): (path.stat().st_mtime, path.stat().st_mode) for path in to.rglob("*")}
        for to in (tmp_path / "one", tmp_path / "two")
    )
    assert one == two
    assert {mtime for mtime, _ in one.values()} == {REPRODUCIBLE_MTIME}


def test_a_commit_that_the_remote_lacks_is_told_at_once(remote: tuple[Path, str], run: Run, tmp_path: Path) -> None:
    status, said = run(remote[0].as_uri(), "a" * 40)
    assert (status, said) == (1, f"fetch_toolkit: {remote[0].as_uri()} has no commit {'a' * 40}\n")
    assert not (tmp_path / "toolkit").exists()


def test_the_number_of_something_else_is_refused(remote: tuple[Path, str], run: Run) -> None:
    tag = git(remote[0], "rev-parse", "v1")
    status, said = run(remote[0].as_uri(), tag)
    assert (status, f"returned another commit for {tag}" in said) == (1, True)


def test_a_repo_without_the_modules_is_refused(remote: tuple[Path, str], run: Run, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    git(other, "init", "-q")
    git(other, "commit", "-q", "--allow-empty", "-m", "nothing")
    status, said = run(other.as_uri(), git(other, "rev-parse", "HEAD"))
    assert (status, f"it lacks {PIPELINE}, {UTILS}" in said) == (1, True)


def test_a_remote_that_comes_back_is_waited_for(
    remote: tuple[Path, str], run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    away = shutil.copytree(remote[0], tmp_path / "away")
    monkeypatch.setattr(retry, "_FIRST_PAUSE", 0.2)
    threading.Timer(0.3, lambda: away.rename(tmp_path / "back")).start()
    status, said = run((tmp_path / "back").as_uri(), remote[1])
    assert (status, "next attempt in" in said) == (0, True)


def test_a_remote_that_goes_away_while_files_are_read_is_told(
    remote: tuple[Path, str], run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, commit = remote
    git(folder, "config", "uploadpack.allowFilter", "true")
    gone = tmp_path / "gone"
    shutil.copytree(folder, gone)
    fetch = fetch_toolkit.Repo.fetch

    def fetch_and_go(self: fetch_toolkit.Repo, *arguments: str) -> None:
        fetch(self, *arguments)
        shutil.rmtree(gone)

    monkeypatch.setattr(fetch_toolkit.Repo, "fetch", fetch_and_go)
    status, said = run(gone.as_uri(), commit)
    assert (status, f"of commit {commit} cannot be fetched" in said) == (1, True)
    assert not (tmp_path / "toolkit").exists()


def test_a_server_that_breaks_off_is_told_after_some_tries(run: Run) -> None:
    with web_server.serve() as web:
        path = "/repo.git/info/refs?service=git-upload-pack"
        web.gives(path, b"no", status=503)
        web.breaks_off(path, b"001e# serv", declared=500, Content_Type="application/x-git-upload-pack-advertisement")
        status, said = run(web.url("/repo.git").replace("//", "//user:password@"), "a" * 40)
        assert status == 1
        assert re.search(rf"{web.url('/repo.git')} cannot be fetched from: .+, 5 times in a row", said)
        assert (web.hits(path), "password" in said) == (5, False)


def test_a_checkout_of_ones_own_is_not_touched(remote: tuple[Path, str], run: Run, tmp_path: Path) -> None:
    folder, commit = remote
    before = sorted(folder.rglob("*"))
    status, said = run(folder.as_uri(), commit, folder)
    assert (status, "is a checkout with its own history" in said, sorted(folder.rglob("*"))) == (1, True, before)


def test_a_commit_has_forty_digits(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("file:///nowhere", "main")
    assert "--commit takes the 40 hexadecimal digits of a commit" in capsys.readouterr().err


def test_without_git_one_line_says_so(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run("file:///nowhere", "a" * 40) == (1, "fetch_toolkit: git is not installed; install it where this runs\n")


def test_it_fetches_what_the_worker_loads() -> None:
    assert fetch_toolkit.MODULES == (toolkit._PIPELINE, toolkit._WAN_UTILS)
