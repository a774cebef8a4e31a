"""Cluster profiles: where they are found, what they may say, and every mistake with its line."""

import pytest

from longctx.errors import UserError
from longctx.launch.cluster.profile import PROFILES, LocalProfile, SlurmProfile, SshProfile, load_profile

BASE = """
[base]
executor = "slurm"
account = "llm"
time = "24h"
environment = { A = "1", B = "2" }

[big]
extends = "base"
nodes = 4
gpus = 8
environment = { B = "3" }
"""


def message(*arguments) -> str:
    with pytest.raises(UserError) as error:
        load_profile(*arguments)
    return str(error.value)


def test_a_profile_starts_from_the_one_that_it_extends(profiles):
    profiles(BASE)
    profile = load_profile("big", None, ["nodes=2"])
    assert isinstance(profile, SlurmProfile)
    assert (profile.account, profile.time, profile.node_count, profile.ranks_per_node) == ("llm", 24 * 3600, 2, 8)
    assert profile.environment == {"A": "1", "B": "3"}


def test_it_is_looked_for_here_above_and_in_the_users_configuration(profiles, workplace, tmp_path, monkeypatch):
    assert message("big").startswith("--profile big: there is no clusters.toml: write one (")
    (tmp_path / "config/longctx").mkdir(parents=True)
    (tmp_path / "config/longctx/clusters.toml").write_text('[mine]\nexecutor = "local"\n')
    profiles(BASE)
    (workplace / "below").mkdir()
    monkeypatch.chdir(workplace / "below")
    assert isinstance(load_profile("base"), SlurmProfile)
    assert isinstance(load_profile("mine"), LocalProfile)
    assert "has no such profile (it has base, big, mine)" in message("other")


def test_the_profile_local_needs_no_file(workplace):
    assert load_profile("local", None, ["ranks=2"]).ranks_per_node == 2


def test_hosts_are_the_nodes(profiles):
    profiles('[hosts]\nexecutor = "ssh"\nhosts = ["a", "b"]\n')
    profile = load_profile("hosts")
    assert isinstance(profile, SshProfile)
    assert (profile.node_count, profile.ranks_per_node) == (2, 1)
    assert "nodes: there are 2 hosts; omit nodes" in message("hosts", None, ["nodes=3"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('executor = "slrum"', "clusters.toml:2: big.executor: 'slrum' is none: give one of local, slurm, ssh"),
        ("nodes = 2", "clusters.toml:1: big.executor: missing: give one of"),
        ('executor = "slurm"\ngpsu = 8', "clusters.toml:3: gpsu: unknown key; did you mean 'gpus'?"),
        (
            'executor = "slurm"\nnodes = 0\npartition = 3',
            "2 mistakes in the profile:\n  clusters.toml:3: nodes: should",
        ),
        ('executor = "slurm"\ntime = "soon"', "clusters.toml:3: time: 'soon' is not a duration"),
        ('executor = "slurm"\nmounts = ["/a:/b"]', "mounts: are those of a container; give container too"),
        ('executor = "slurm"\nenvironment = { "A B" = "1" }', "'A B' cannot name an environment variable"),
        ('executor = "slurm"\nsetup = ["a\\nb"]', "has several lines; give one line per string"),
        ('executor = "local"\nnodes = 2', "nodes: 2 nodes need another executor"),
        ('executor = "kubernetes"', "image: missing"),
        ('executor = "skypilot"\ngpus = 8', "accelerator: gpus and accelerator belong together"),
        ('extends = "none"', "clusters.toml:2: extends: "),
        ('extends = "big"', "profiles extend each other in a cycle: big → big"),
    ],
)
def test_mistakes_have_their_line(profiles, text, said):
    profiles(f"[big]\n{text}\n")
    assert said in message("big")


def test_a_key_that_is_no_table_is_no_profile(profiles):
    profiles("big = 3\n")
    assert "clusters.toml:1: big: should be a table, [big], of a profile's keys" in message("big")


def test_every_executor_has_a_class():
    assert {name: cls.model_fields["executor"].annotation.__args__ for name, cls in PROFILES.items()} == {
        name: (name,) for name in PROFILES
    }
