"""Network emulation for benchmarks: hosts in network namespaces, joined by a bridge with links of a given speed.

Linux only, as root, with `ip` and `tc` (iproute2). Each host's link is shaped in both directions by a token bucket
filter (`tc ... tbf`), and delayed by `netem` if a delay is set. Everything is removed afterwards; what a killed process
left is removed by the next one.
"""

import os
import re
import secrets
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from longctx.errors import UserError

SUBNET = "10.213.0"
INTERFACE = "eth0"
"""A host's link, inside its namespace."""
MAX_HOSTS = 250
_TAG = "lcx[0-9a-f]{6}"


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{' '.join(command)}: {done.stderr.strip() or f'exit status {done.returncode}'}")
    return done.stdout


def check() -> None:
    """Raise UserError if hosts cannot be created here, naming what is missing."""
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            raise UserError(
                f"--gbit: the command {tool} is missing; install iproute2, or use --gbit none for ranks without links"
            )
    if os.geteuid() != 0:
        raise UserError("--gbit: network namespaces need root; run as root, or use --gbit none")


def _shape(device: str, gbit: float, delay: float, *inside: str) -> None:
    """Shape the outgoing traffic of a device."""
    rate = f"{round(gbit * 1e6)}kbit"
    # A bucket of one millisecond, and a queue long enough not to drop the packets in flight.
    burst = f"{max(16, round(gbit * 1e6 / 8 / 1000))}kb"
    _run(
        *inside,
        "tc",
        "qdisc",
        "add",
        "dev",
        device,
        "root",
        "handle",
        "1:",
        "tbf",
        "rate",
        rate,
        "burst",
        burst,
        "limit",
        "64mb",
    )
    if delay:
        # netem after tbf delays the packets that tbf has passed.
        _run(
            *inside,
            "tc",
            "qdisc",
            "add",
            "dev",
            device,
            "parent",
            "1:1",
            "handle",
            "10:",
            "netem",
            "delay",
            f"{delay}ms",
        )


def _claim(tag: str) -> socket.socket | None:
    """Claim the names that begin with a tag, until the socket is closed; None if a process has claimed them.

    An abstract socket belongs to a network namespace, as the bridge does, and ends with its process, however that ends.
    """
    claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        claim.bind(f"\0longctx-{tag}")
    except OSError:
        claim.close()
        return None
    return claim


def _claim_new() -> tuple[str, socket.socket]:
    while True:
        tag = f"lcx{secrets.token_hex(3)}"
        if (claim := _claim(tag)) is not None:
            return tag, claim


def _remove_leftovers() -> None:
    """Remove the hosts of processes that were killed: those whose bridge is here and whose tag nobody claims."""
    for tag in re.findall(rf"^\d+: ({_TAG})b:", _run("ip", "-o", "link"), re.MULTILINE):
        claim = _claim(tag)
        if claim is not None:
            with claim:
                _remove(tag)


def _remove(tag: str) -> None:
    """Remove the hosts whose names begin with a tag, as far as they were created."""
    for space in re.findall(rf"^{tag}n\d+\b", _run("ip", "netns"), re.MULTILINE):
        subprocess.run(["ip", "netns", "del", space], capture_output=True, check=False)
    # Links explicitly: a removed namespace releases its devices only later. The bridge last: the next process finds by
    # it what is left if this one is killed meanwhile.
    for link in (*re.findall(rf"^\d+: ({tag}v\d+)\b", _run("ip", "-o", "link"), re.MULTILINE), f"{tag}b"):
        subprocess.run(["ip", "link", "del", link], capture_output=True, check=False)


@contextmanager
def hosts(count: int, gbit: float, delay: float = 0.0) -> Iterator[list[list[str]]]:
    """Create `count` hosts with links of `gbit` Gbit/s per direction; yield the prefix of a command that runs on each.

    `delay`: one-way latency in milliseconds. Host n has the address `address(n)`. Raises UserError if hosts cannot be
    created. Everything is removed on exit.
    """
    check()
    if not 1 <= count <= MAX_HOSTS:
        raise UserError(f"{count} hosts: give 1 to {MAX_HOSTS}")
    _remove_leftovers()
    tag, claim = _claim_new()
    bridge = f"{tag}b"
    with claim, ExitStack() as stack:
        stack.callback(_remove, tag)
        _run("ip", "link", "add", bridge, "type", "bridge")
        _run("ip", "link", "set", bridge, "up")
        commands = []
        for number in range(count):
            space, outside = f"{tag}n{number}", f"{tag}v{number}"
            _run("ip", "netns", "add", space)
            inside = ["ip", "netns", "exec", space]
            _run("ip", "link", "add", outside, "type", "veth", "peer", "name", INTERFACE, "netns", space)
            _run("ip", "link", "set", outside, "master", bridge, "up")
            _run(*inside, "ip", "addr", "add", f"{address(number)}/24", "dev", INTERFACE)
            _run(*inside, "ip", "link", "set", "lo", "up")
            _run(*inside, "ip", "link", "set", INTERFACE, "up")
            _shape(outside, gbit, 0.0)
            _shape(INTERFACE, gbit, delay, *inside)
            commands.append(inside)
        yield commands


def address(number: int) -> str:
    """Return the IP address of host `number`."""
    return f"{SUBNET}.{number + 1}"
