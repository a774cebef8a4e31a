"""The table of executors: one for every profile but that of this machine."""

import pytest

from longctx.launch.cluster.executors import EXECUTORS, follower_of
from longctx.launch.cluster.job import Record
from longctx.launch.cluster.profile import PROFILES


def test_every_profile_has_its_executor():
    assert {*EXECUTORS} == {*PROFILES} - {"local"}


@pytest.mark.parametrize("name", [name for name, kind in EXECUTORS.items() if kind.follower is not None])
def test_a_record_is_followed_by_the_module_of_its_executor(name):
    assert vars(follower_of(Record("run", name, "12")))["__name__"] == f"longctx.launch.cluster.{name}"
