"""Files that are whole or absent, manifests that notice damage, and what all programs share."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_sas.core import files
from megatron_sas.core.cli import InputError, progress, run_main
from megatron_sas.core.files import (
    atomic_directory,
    check_absent,
    sha256_file,
    write_bytes_atomic,
    write_json_atomic,
)
from megatron_sas.core.manifest import MANIFEST, read_manifest, verify_manifest, write_manifest


@contextlib.contextmanager
def umask(mask: int):
    old = os.umask(mask)
    try:
        yield
    finally:
        os.umask(old)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_one_hash_of_several_files(tmp_path):
    """Of names and contents, wherever they lie; read again only when a file has changed."""
    for folder in ("one", "two"):
        (tmp_path / folder / "b").mkdir(parents=True)
        for name in ("b/y", "b/x", "a", "other"):
            (tmp_path / folder / name).write_text(name if name != "other" else folder)
    first = files.sha256_files(tmp_path / "one", ["b", "a", "missing"])
    lines = "".join(f"{hashlib.sha256(name.encode()).hexdigest()} {name}\n" for name in ("a", "b/x", "b/y"))
    assert first == hashlib.sha256(lines.encode()).hexdigest() == files.sha256_files(tmp_path / "one", ["a", "b"])
    status = (tmp_path / "one" / "a").stat()
    (tmp_path / "one" / "a").write_text("b")
    os.utime(tmp_path / "one" / "a", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert files.sha256_files(tmp_path / "one", ["b", "a"]) == first  # not read again
    os.utime(tmp_path / "one" / "a", ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert files.sha256_files(tmp_path / "one", ["b", "a"]) != first
    assert files.sha256_files(tmp_path / "two", ["a", "b"]) == first
    (tmp_path / "two" / "b" / "x").rename(tmp_path / "two" / "b" / "z")
    assert files.sha256_files(tmp_path / "two", ["a", "b"]) != first


def test_write_atomic_creates_parents_and_obeys_umask(tmp_path):
    with umask(0o027):
        write_json_atomic(tmp_path / "a" / "b" / "file.json", {"z": 1, "a": "ä"})
    path = tmp_path / "a" / "b" / "file.json"
    assert path.read_text(encoding="utf-8") == '{\n  "z": 1,\n  "a": "ä"\n}\n'
    assert mode(path) == 0o640
    assert list(path.parent.iterdir()) == [path]


def test_json_has_null_for_numbers_that_it_lacks(tmp_path):
    value = {"a": [float("nan"), (1.5, float("-inf"))], "b": {"c": float("inf")}, "d": [None, True, 2, "NaN"]}
    write_json_atomic(tmp_path / "file.json", value)
    found = json.loads((tmp_path / "file.json").read_text(), parse_constant=pytest.fail)
    assert found == {"a": [None, [1.5, None]], "b": {"c": None}, "d": [None, True, 2, "NaN"]}


@pytest.mark.parametrize("function", ["replace", "fsync"])
def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, function):
    path = tmp_path / "file"
    write_bytes_atomic(path, b"old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(files.os, function, fail)
    with pytest.raises(OSError, match="disk full"):
        write_bytes_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_killed_write_leaves_the_old_file(tmp_path):
    """The process dies without any clean-up just before the rename."""
    path = tmp_path / "file"
    path.write_bytes(b"old")
    code = (
        "import os, sys; from megatron_sas.core import files\n"
        "files.os.replace = lambda *a: os._exit(9)\n"
        "files.write_bytes_atomic(sys.argv[1], b'new')"
    )
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code, str(path)], cwd=root, check=False).returncode == 9
    assert path.read_bytes() == b"old"


def test_outputs_that_exist_are_refused_unless_they_may_be_overwritten(tmp_path):
    check_absent(tmp_path / "absent")
    check_absent(tmp_path, overwrite=True)
    with pytest.raises(InputError, match="exists already; choose another output or pass --overwrite"):
        check_absent(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match="exists already"):
        check_absent(tmp_path / "link")


def test_a_slash_at_the_end_hides_no_file(tmp_path):
    (tmp_path / "a.json").touch()
    with pytest.raises(InputError, match="exists already"):
        check_absent(f"{tmp_path}/a.json/")


def test_atomic_directory(tmp_path):
    target = tmp_path / "out" / "model"
    with umask(0o022), atomic_directory(target) as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "file").write_text("content")
        assert not target.exists()
    assert (target / "sub" / "file").read_text() == "content"
    assert mode(target) == 0o755
    assert list(target.parent.iterdir()) == [target]


def test_atomic_directory_vanishes_when_the_block_raises(tmp_path):
    target = tmp_path / "model"
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), atomic_directory(target) as temporary:
            (temporary / "file").write_text("half")
            raise error
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("old_is_a_file", [False, True])
def test_atomic_directory_replaces_only_with_overwrite(tmp_path, old_is_a_file):
    target = tmp_path / "model"
    if old_is_a_file:
        target.write_text("old")
    else:
        target.mkdir()
        (target / "old").write_text("old")
    with pytest.raises(InputError, match="exists already"), atomic_directory(target):
        pass
    with pytest.raises(ValueError), atomic_directory(target, overwrite=True):
        raise ValueError
    assert target.is_file() == old_is_a_file
    with atomic_directory(target, overwrite=True) as temporary:
        (temporary / "new").write_text("new")
    assert [path.name for path in target.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [target]


def test_atomic_directory_does_not_replace_what_came_meanwhile(tmp_path):
    target = tmp_path / "model"
    with pytest.raises(InputError, match="exists already"), atomic_directory(target):
        target.mkdir()
        (target / "other").write_text("somebody else's")
    assert (target / "other").exists()
    assert list(tmp_path.iterdir()) == [target]


def test_sha256_file(tmp_path):
    content = os.urandom(100_000)
    (tmp_path / "file").write_bytes(content)
    assert sha256_file(tmp_path / "file") == hashlib.sha256(content).hexdigest()


@pytest.fixture
def whole(tmp_path) -> Path:
    """A directory with two files and their manifest."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.bin").write_bytes(b"abcdef")
    (tmp_path / "sub" / "b.bin").write_bytes(b"")
    write_manifest(tmp_path, step=7, format="x")
    return tmp_path


def test_manifest_of_a_whole_directory(whole):
    manifest = verify_manifest(whole)
    assert (manifest["step"], manifest["format"]) == (7, "x")
    assert set(manifest["files"]) == {"a.bin", "sub/b.bin"}
    assert manifest["files"]["a.bin"] == {"size": 6, "sha256": hashlib.sha256(b"abcdef").hexdigest()}
    (whole / "later.txt").write_text("a file that nobody vouches for")
    verify_manifest(whole)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"a\.bin: is missing"),
        (b"abcde", r"a\.bin: has 5 bytes, not 6"),
        (b"abcdeX", r"a\.bin: its SHA-256 differs"),
    ],
)
def test_manifest_notices_damage(whole, content, message):
    if content is None:
        (whole / "a.bin").unlink()
    else:
        (whole / "a.bin").write_bytes(content)
    with pytest.raises(InputError, match=message):
        verify_manifest(whole)
    verify_manifest(whole, ["sub/b.bin"])
    with pytest.raises(InputError, match="never: is missing"):
        verify_manifest(whole, ["never"])


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.EACCES])
def test_manifest_names_a_file_that_cannot_be_read(whole, code):
    """A bad disk or a stale handle: the file's size is known, its content is not to be had."""

    def fail(path):
        raise OSError(code, os.strerror(code))

    message = f"{whole / 'a.bin'}: cannot be read ({os.strerror(code)}); use another checkpoint"
    with pytest.raises(InputError, match=re.escape(message)):
        verify_manifest(whole, ["a.bin"], sha256=fail)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"files": 3}', "\x00"])
def test_damaged_manifest(whole, content):
    (whole / MANIFEST).write_text(content)
    with pytest.raises(InputError, match=r"manifest\.json: is damaged"):
        read_manifest(whole)


def test_missing_manifest(tmp_path):
    with pytest.raises(InputError, match=r"has no manifest\.json, so it was never finished"):
        verify_manifest(tmp_path)


@pytest.mark.parametrize(
    ("raised", "code", "line"),
    [
        (None, 0, ""),
        (InputError("file:3: wrong; mend it"), 2, "error: file:3: wrong; mend it\n"),
        (FileNotFoundError(2, "No such file or directory", "/nowhere"), 2, "error: /nowhere: No such file or dir"),
        (OSError("disk full"), 2, "error: disk full\n"),
        (KeyboardInterrupt(), 130, "error: interrupted"),
    ],
)
def test_run_main(capsys, raised, code, line):
    def main() -> None:
        if raised is not None:
            raise raised

    with pytest.raises(SystemExit) as exit_:
        run_main(main)
    assert exit_.value.code == code
    assert capsys.readouterr().err.startswith(line)


def test_run_main_passes_on_codes_and_bugs():
    with pytest.raises(SystemExit) as exit_:
        run_main(lambda: 3)
    assert exit_.value.code == 3
    with pytest.raises(ZeroDivisionError):
        run_main(lambda: 1 // 0)


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(("stream", "shown"), [(io.StringIO(), False), (Terminal(), True)])
def test_progress_is_silent_without_a_terminal(stream, shown):
    with contextlib.redirect_stderr(stream):
        assert list(progress(range(3), desc="counting")) == [0, 1, 2]
    assert ("counting" in stream.getvalue()) == shown
    assert bool(stream.getvalue()) == shown


def test_written_json_is_json(tmp_path):
    write_json_atomic(tmp_path / "x.json", [1.5, None, "é"])
    assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8")) == [1.5, None, "é"]
