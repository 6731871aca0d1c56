"""A loopback device of one's own, whose counters say what a program really sent to itself.

gloo's ranks on one machine talk over TCP on `lo`. In a network namespace of their own nobody else
does, so that the kernel's counters hold their bytes and nothing more. Linux only.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import struct
import subprocess
import sys
from pathlib import Path

from experiments.process import module_command

SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 0x1  # linux/sockios.h, linux/if.h
COUNTERS = Path("/proc/net/dev")
SENT_BYTES = 8  # place of a device's transmitted bytes behind its name: Linux, net-procfs.c


def namespace() -> list[str]:
    """What to put before a command so that it has a loopback device of its own.

    Raises OSError with the reason where this system or user may not.
    """
    if sys.platform != "linux" or shutil.which("unshare") is None:
        raise OSError("network namespaces need Linux and util-linux's unshare")
    said = ""
    for prefix in (["unshare", "-n"], ["unshare", "-Urn"]):  # as root; as anyone
        tried = subprocess.run([*prefix, "true"], capture_output=True, text=True)
        if tried.returncode == 0:
            return prefix
        said = tried.stderr.strip()
    raise OSError(f"no network namespace: {said}")


def bring_up(device: str = "lo") -> None:
    """A new namespace's loopback is down."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = struct.pack("16sh14x", device.encode(), 0)
        (flags,) = struct.unpack("16xh14x", fcntl.ioctl(any_socket, SIOCGIFFLAGS, request))
        request = struct.pack("16sh14x", device.encode(), flags | IFF_UP)
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, request)


def sent_bytes(device: str = "lo") -> int:
    """What the kernel has sent on a device, frames with their headers."""
    for line in COUNTERS.read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == device:
            return int(numbers.split()[SENT_BYTES])
    raise OSError(f"{COUNTERS}: no device {device}")


def python_in_namespace(module: str, *arguments: str) -> None:
    """Run a module with a loopback of its own; the module calls bring_up().

    Raises OSError where that cannot be, or CalledProcessError.
    """
    command = [*namespace(), *module_command(module), *arguments]
    subprocess.run(command, check=True, env=dict(os.environ))
