"""Ranks as hosts of a network: each in a network namespace of its own, joined by a bridge over links of a given speed.

Linux alone, as root, with `ip` and `tc` (iproute2). Each host's link is shaped in both directions by a token bucket
(`tc ... tbf`), and where a delay is asked for, by `netem` in front of it. Everything that was made is removed again.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from longctx.errors import UserError

SUBNET = "10.213.0"
INTERFACE = "eth0"
"""A host's link, inside its namespace."""
MOST = 250


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{' '.join(command)}: {done.stderr.strip() or f'exit status {done.returncode}'}")


def check() -> None:
    """Raise UserError, saying what is missing, where hosts cannot be made here."""
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            raise UserError(
                f"--gbit: there is no {tool} here; install iproute2, or give --gbit none for ranks without links"
            )
    if os.geteuid() != 0:
        raise UserError("--gbit: making network namespaces takes root; run as root, or give --gbit none")


def _shape(device: str, gbit: float, delay: float, *inside: str) -> None:
    """Shape what leaves a device."""
    rate = f"{round(gbit * 1e6)}kbit"
    # A bucket of a millisecond, and a queue that is long enough not to drop what a sender has under way.
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
        # netem behind tbf delays what has been let through.
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


@contextmanager
def hosts(count: int, gbit: float, delay: float = 0.0) -> Iterator[list[list[str]]]:
    """`count` hosts: for each the words that a command begins with to run there. Links of `gbit` Gbit/s each way.

    `delay`: milliseconds that a packet takes to leave a host. The first host has the address `address(0)`. Raises
    UserError where hosts cannot be made, and leaves nothing behind.
    """
    check()
    if not 1 <= count <= MOST:
        raise UserError(f"{count} hosts: from 1 to {MOST} can be made")
    tag = f"lcx{os.getpid() % 100000}"
    bridge = f"{tag}b"
    with ExitStack() as stack:
        _run("ip", "link", "add", bridge, "type", "bridge")
        stack.callback(subprocess.run, ["ip", "link", "del", bridge], capture_output=True, check=False)
        _run("ip", "link", "set", bridge, "up")
        commands = []
        for number in range(count):
            space, outside = f"{tag}n{number}", f"{tag}v{number}"
            _run("ip", "netns", "add", space)
            stack.callback(subprocess.run, ["ip", "netns", "del", space], capture_output=True, check=False)
            inside = ["ip", "netns", "exec", space]
            _run("ip", "link", "add", outside, "type", "veth", "peer", "name", INTERFACE, "netns", space)
            # By itself: a namespace that is removed gives its devices up only later.
            stack.callback(subprocess.run, ["ip", "link", "del", outside], capture_output=True, check=False)
            _run("ip", "link", "set", outside, "master", bridge, "up")
            _run(*inside, "ip", "addr", "add", f"{address(number)}/24", "dev", INTERFACE)
            _run(*inside, "ip", "link", "set", "lo", "up")
            _run(*inside, "ip", "link", "set", INTERFACE, "up")
            _shape(outside, gbit, 0.0)
            _shape(INTERFACE, gbit, delay, *inside)
            commands.append(inside)
        yield commands


def address(number: int) -> str:
    """The address of a host."""
    return f"{SUBNET}.{number + 1}"
