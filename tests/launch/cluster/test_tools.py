"""Commands of schedulers, and YAML."""

import pytest
import yaml

from longctx.errors import UserError
from longctx.launch.cluster.tools import run_tool, to_yaml


def test_a_command_that_is_missing_or_fails_is_named(tools):
    with pytest.raises(UserError, match=r"^sbatch: there is no such command here; run longctx launch where"):
        run_tool(("sbatch", "x"))
    tools.add("sbatch", "said", status=3)
    with pytest.raises(UserError, match=r"^sbatch 'a b': said$"):
        run_tool(("sbatch", "a b"))
    tools.add("sbatch", status=3)
    with pytest.raises(UserError, match=r"^sbatch x: exit status 3$"):
        run_tool(("sbatch", "x"))


def test_texts_of_several_lines_are_blocks_and_what_is_empty_is_left_out():
    same = {"b": "yes"}
    value = {"z": "first\nsecond # no comment\n", "a": [same, same], "none": None, "empty": {"inner": []}}
    text = to_yaml(value)
    assert text.startswith("z: |\n  first\n  second # no comment\na:\n")
    assert "&" not in text, "no references"
    assert yaml.safe_load(text) == {"z": value["z"], "a": [same, same]}
