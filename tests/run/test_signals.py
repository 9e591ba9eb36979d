"""What a process does with signals, in this one; `faults/test_stopping.py` has real ones."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

import pytest

from megatron_sas.run.signals import SIGNALS, StopRequest


@pytest.fixture
def received():
    """The signals that reach the handlers from before `listen`."""
    numbers = []
    before = {number: signal.signal(number, lambda number, _: numbers.append(number)) for number in SIGNALS}
    yield numbers
    signal.set_wakeup_fd(-1)
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_dry_run_does_with_signals_what_was_done_before(received):
    stop = StopRequest()
    stop.listen()
    stop.no_longer_listen()
    assert received == []
    for number in SIGNALS:
        signal.raise_signal(number)
    assert received == list(SIGNALS) and stop.reason is None


def test_a_signal_from_before_the_dry_run_is_not_lost(received):
    stop = StopRequest()
    stop.listen()
    signal.raise_signal(signal.SIGUSR1)
    assert (received, stop.reason) == ([], "SIGUSR1")
    stop.no_longer_listen()
    assert (received, stop.reason) == ([signal.SIGUSR1], None)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_the_first_process_says_once_that_it_heard(received, capfd, monkeypatch, rank):
    monkeypatch.setenv("RANK", rank)
    stop = StopRequest()
    stop.listen()
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
        signal.raise_signal(number)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    lines = ["SIGTERM: stopping after this update", "SIGINT: stopping after this update; Ctrl-C again ends at once"]
    assert capfd.readouterr().err.splitlines() == (lines if rank == "0" else [])


def test_the_second_interrupt_ends_whatever_the_launcher_has_sent_meanwhile(received):
    """`deepspeed` answers Ctrl-C, which reaches the ranks as well, with a SIGTERM to them."""
    stop = StopRequest()
    stop.listen()
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_two_interrupts_before_python_calls_the_handler_are_two(received):
    """Python calls it once for both. C calls that nothing of Python's comes between are the only way to see this."""
    send = ctypes.CDLL(None)["raise"]
    stop = StopRequest()
    stop.listen()
    assert list(map(send, [signal.SIGTERM, signal.SIGINT])) == [0, 0]
    assert stop.reason in ("SIGTERM", "SIGINT")
    again = StopRequest()
    again.listen()
    with pytest.raises(KeyboardInterrupt):
        list(map(send, [signal.SIGINT, signal.SIGINT]))
    assert again.reason == "SIGINT"


@pytest.mark.parametrize("inside", ["rank_by_launcher", "isatty", "read", "write", "__call__"])
def test_an_interrupt_while_the_first_is_handled_is_the_second(received, inside):
    """At each function that the handler calls; `__call__` is that of `signal.Signals`."""
    reached = []

    def interrupt(frame, event, argument):
        called = argument.__name__ if event == "c_call" else frame.f_code.co_name if event == "call" else ""
        if called == inside and not reached:
            reached.append(called)
            sys.setprofile(None)
            signal.raise_signal(signal.SIGINT)

    stop = StopRequest()
    stop.listen()
    try:
        with pytest.raises(KeyboardInterrupt):
            sys.setprofile(interrupt)
            signal.raise_signal(signal.SIGINT)
    finally:
        sys.setprofile(None)
    assert reached == [inside]
    assert stop.reason == "SIGINT"  # and so the program prints "interrupted twice"


def test_a_hangup_is_a_request_except_under_nohup(received):
    ignoring = StopRequest()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    ignoring.listen()
    signal.raise_signal(signal.SIGHUP)
    assert ignoring.reason is None
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    stop = StopRequest()
    stop.listen()
    signal.raise_signal(signal.SIGHUP)
    assert stop.reason == "SIGHUP"


def test_a_closed_standard_error_does_not_matter(received):
    stop = StopRequest()
    stop.listen()
    kept, (reader, writer) = os.dup(2), os.pipe()
    os.close(reader)
    try:
        os.dup2(writer, 2)  # where nobody reads
        signal.raise_signal(signal.SIGTERM)
    finally:
        os.dup2(kept, 2)
        os.close(writer)
        os.close(kept)
    assert stop.reason == "SIGTERM"
