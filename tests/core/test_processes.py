"""What the processes of commands have in common."""

import ctypes
import os
from types import SimpleNamespace

from megatron_sas.core.processes import keep_freed_memory


def test_freed_memory_is_kept_unless_the_user_decides(monkeypatch):
    asked = []
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace(mallopt=lambda *what: asked.append(what)))
    for name in [name for name in os.environ if name.startswith("MALLOC_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    keep_freed_memory()
    assert asked == []
    monkeypatch.delenv("MALLOC_ARENA_MAX")
    keep_freed_memory()
    assert asked == [(-1, 2**30), (-3, 2**25)]
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace())  # another C library
    keep_freed_memory()
