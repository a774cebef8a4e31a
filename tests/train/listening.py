"""Ranks that list the addresses on which they listen, with every kind of group that a run makes."""

import json
import os
from pathlib import Path

import psutil
import torch
import torch.distributed as dist

from longctx.parallel.mesh import Mesh
from longctx.train.process_group import process_group


def listening() -> list[str]:
    """Addresses of this process's listening TCP sockets and bound UDP sockets."""
    sockets = psutil.Process().net_connections(kind="inet")
    return [each.laddr.ip for each in sockets if each.status in (psutil.CONN_LISTEN, psutil.CONN_NONE)]


def use_groups() -> list[str]:
    """Communicate in the default group, a mesh's and one more; return `listening()` meanwhile."""
    for group in (None, Mesh.build("cpu", cp=dist.get_world_size()).cp.group, dist.new_group(backend="gloo")):
        dist.all_reduce(torch.ones(2), group=group)
    dist.barrier()
    found = listening()
    dist.barrier()
    return found


def report(folder: str) -> None:
    """Write a rank's addresses and its interface to `folder`."""
    with process_group("cpu", 60.0):
        content = {"addresses": use_groups(), "interface": os.environ["GLOO_SOCKET_IFNAME"]}
    Path(folder, f"rank-{os.environ['RANK']}.json").write_text(json.dumps(content))
