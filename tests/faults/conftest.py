"""What fault tests share: one process to fork from."""

from __future__ import annotations

import pytest
from processes import ForkServer


@pytest.fixture(scope="session")
def fork_server():
    with ForkServer() as running:
        yield running
