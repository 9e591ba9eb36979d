"""What a lock says to those who only look."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from megatron_sas.core.cli import InputError
from megatron_sas.core.directory_lock import LOCK, SINCE, DirectoryLock, Holder, read_holder, this_process


def test_the_holder_is_read_while_it_holds_the_lock(tmp_path):
    assert read_holder(tmp_path) is None
    lock = DirectoryLock(tmp_path, "wait")
    lock.take()
    holder = read_holder(tmp_path)
    assert (holder.process, holder.host) == (os.getpid(), socket.gethostname())
    assert holder.is_alive
    lock.write([this_process(), f"process 1 on elsewhere{SINCE}1.00"])
    assert read_holder(tmp_path) == Holder(os.getpid(), socket.gethostname(), this_process())
    assert read_holder(tmp_path).is_alive
    lock.release()
    assert read_holder(tmp_path) is None


def test_reading_the_holder_keeps_nobody_out(tmp_path):
    first, second = DirectoryLock(tmp_path, "wait"), DirectoryLock(tmp_path, "wait")
    first.take()
    read_holder(tmp_path)
    with pytest.raises(InputError, match="is running in this directory; wait"):
        second.take()
    first.close()  # as when its process dies
    assert read_holder(tmp_path) is not None
    second.take()
    second.release()


@pytest.mark.parametrize("since", ["", f"{SINCE}1.00"])
def test_a_process_that_ended_is_not_alive(tmp_path, since):
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    assert not Holder(child.pid, "here", f"process {child.pid} on here{since}").is_alive


def test_a_later_process_of_the_same_number_is_not_the_holder():
    line = f"process {os.getpid()} on here{SINCE}1.00"
    assert not Holder(os.getpid(), "here", line).is_alive


@pytest.mark.parametrize("content", ["", "\n", "something else\n", "process x on y\n"])
def test_other_content_names_nobody(tmp_path, content):
    (tmp_path / LOCK).write_text(content)
    assert read_holder(tmp_path) is None
