"""Two hosts on one machine: network namespaces with addresses of their own, joined by a virtual cable (needs root)."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from engine_runs import LAUNCHER_VARIABLES, ROOT

INTERFACE = "cable"


def refusal() -> str | None:
    """Why namespaces cannot be made here, or None when they can."""
    if shutil.which("ip") is None:
        return "ip (iproute2) is not installed"
    name = f"probe-{os.getpid()}"
    done = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if done.returncode:
        return f"network namespaces are not permitted here ({done.stderr.strip()})"
    _ip("netns", "delete", name)
    return None


class Host:
    """A namespace with one address; processes started in it see no other network."""

    def __init__(self, number: int) -> None:
        self.name, self.address = f"msa-{os.getpid()}-{number}", f"10.77.0.{number + 1}"
        _ip("netns", "add", self.name)

    def start(self, log: Path, *arguments: object, **environment: str) -> subprocess.Popen:
        """Run this Python with `arguments` there; its output is appended to `log`."""
        clean = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
        # Without the name of the interface gloo announces the address of the host's name, which is another machine's.
        own = {"GLOO_SOCKET_IFNAME": INTERFACE, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        command = ["ip", "netns", "exec", self.name, sys.executable, *map(str, arguments)]
        with log.open("ab") as file:
            return subprocess.Popen(command, stdout=file, stderr=file, env=clean | own | environment)

    def processes(self) -> list[int]:
        """Everything that runs there."""
        return [int(number) for number in _ip("netns", "pids", self.name).split()]

    def kill(self) -> None:
        """Kill -9 everything that runs there."""
        while pids := self.processes():
            for pid in pids:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue

    def plug(self, state: str) -> None:
        """Set the cable `up` or `down`."""
        _ip("-n", self.name, "link", "set", INTERFACE, state)


class VirtualHosts:
    """`with VirtualHosts() as (first, second)`: two connected hosts; everything in them is killed at the end."""

    def __enter__(self) -> tuple[Host, Host]:
        self.hosts = (Host(0), Host(1))
        first, second = self.hosts
        end = ("type", "veth", "peer", "name", INTERFACE, "netns", second.name)
        _ip("link", "add", INTERFACE, "netns", first.name, *end)
        for host in self.hosts:
            _ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", INTERFACE)
            _ip("-n", host.name, "link", "set", "lo", "up")
            host.plug("up")
        return self.hosts

    def __exit__(self, *error: object) -> None:
        for host in self.hosts:
            host.kill()
            _ip("netns", "delete", host.name)


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], capture_output=True, text=True, check=True).stdout
