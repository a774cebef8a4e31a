"""Weights & Biases, with a stand-in for its library: what is asked of it. The real one: tests/adapters."""

import importlib
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from longctx.errors import UserError
from longctx.recipe.tables import WandbConfig
from tests.tracking.records import RUN, point, tracked


@dataclass
class FakeRun:
    id: str
    offline: bool
    calls: list[tuple[Any, ...]] = field(default_factory=list)

    @property
    def settings(self) -> types.SimpleNamespace:
        return types.SimpleNamespace(sync_dir=f"wandb/run-{self.id}")

    @property
    def url(self) -> str:
        return f"https://wandb.example.org/{self.id}"

    @property
    def config(self) -> types.SimpleNamespace:
        return types.SimpleNamespace(update=lambda values, **options: self.calls.append(("config", values, options)))

    def define_metric(self, name: str, **options: object) -> None:
        self.calls.append(("define_metric", name, options))

    def log(self, values: dict[str, float], **options: object) -> None:
        self.calls.append(("log", values, options))

    def mark_preempting(self) -> None:
        self.calls.append(("mark_preempting",))

    def finish(self, exit_code: int) -> None:
        self.calls.append(("finish", exit_code))


class FakeWandb(types.ModuleType):
    """The module `wandb`, on a machine with WANDB_MODE=`mode`."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.mode, self.has_key = "online", True
        self.inits: list[dict[str, Any]] = []

    def Settings(self, **settings: object) -> types.SimpleNamespace:  # noqa: N802 - wandb's name
        return types.SimpleNamespace(**{"mode": self.mode, **settings})

    def setup(self, settings: types.SimpleNamespace) -> types.SimpleNamespace:
        return types.SimpleNamespace(settings=settings)

    def login(self, prompt: bool) -> bool:
        assert not prompt, "a run asks nobody"
        return self.has_key

    def init(self, **arguments: Any) -> FakeRun:
        sys.excepthook = print
        self.inits.append(arguments)
        self.run = FakeRun(arguments["id"], arguments["settings"].mode == "offline")
        return self.run

    def teardown(self, exit_code: int) -> None:
        self.run.calls.append(("teardown", exit_code))


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeWandb]:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delitem(sys.modules, "longctx.tracking.wandb", raising=False)
    yield fake
    sys.modules.pop("longctx.tracking.wandb", None)


def opened(out: Path, previous_id: str | None = None, **config: object) -> Any:
    module = importlib.import_module("longctx.tracking.wandb")
    return module.WandbTracker(WandbConfig(**config), tracked(out, 0 if previous_id is None else 5, previous_id))


def test_the_table_of_the_recipe_reaches_wandb(wandb, tmp_path) -> None:
    tracker = opened(tmp_path, project="p", entity="e", name="n", group="g", tags=("a", "b"))
    (arguments,) = wandb.inits
    settings = vars(arguments.pop("settings"))
    assert arguments == {
        "entity": "e",
        "project": "p",
        "name": "n",
        "group": "g",
        "tags": ["a", "b"],
        "id": tracker.run_id,
        "resume": "allow",
        "dir": str(tmp_path),
    }
    assert (settings["console"], settings["silent"], settings["mode"]) == ("off", True, "online")
    assert tracker.where == f"https://wandb.example.org/{tracker.run_id}"


def test_what_the_recipe_leaves_out_is_wandbs_own_choice(wandb, tmp_path) -> None:
    wandb.mode, wandb.has_key = "offline", False
    tracker = opened(tmp_path)
    (arguments,) = wandb.inits
    assert [arguments[key] for key in ("entity", "project", "group", "tags")] == [None] * 4
    assert arguments["name"] == "tiny"
    assert tracker.where == f"offline. Upload it with: wandb sync wandb/run-{tracker.run_id}"


def test_each_run_has_an_id_of_its_own_and_a_resumed_one_that_of_before(wandb, tmp_path) -> None:
    first, second = opened(tmp_path), opened(tmp_path)
    assert first.run_id != second.run_id
    assert opened(tmp_path, first.run_id).run_id == first.run_id
    assert wandb.inits[2]["id"] == first.run_id


def test_without_a_login_there_is_an_error_and_no_prompt(wandb, tmp_path) -> None:
    wandb.has_key = False
    with pytest.raises(UserError, match=r"nobody is logged in .* set WANDB_API_KEY, or set logging.wandb.mode=offline"):
        opened(tmp_path)
    opened(tmp_path, mode="offline")


def test_the_step_is_a_metric_that_may_go_back(wandb, tmp_path) -> None:
    tracker = opened(tmp_path)
    tracker.write([point(7), point(8), point(6)])
    calls = tracker._run.calls
    assert calls[:3] == [
        ("config", {"seed": 3, "optimizer": {"lr": 0.1}}, {"allow_val_change": True}),
        ("define_metric", "step", {"hidden": True}),
        ("define_metric", "*", {"step_metric": "step"}),
    ]
    assert calls[3:] == [("log", {"step": n, "train/loss": float(n)}, {}) for n in (7, 8, 6)]


def test_constants_are_in_the_config(wandb, tmp_path) -> None:
    tracker = opened(tmp_path)
    tracker.describe(RUN)
    kind, values, options = tracker._run.calls[-1]
    assert (kind, values["run"]["device"], options) == ("config", "a processor", {"allow_val_change": True})


@pytest.mark.parametrize(
    ("outcome", "calls"),
    [
        ("finished", [("finish", 0), ("teardown", 0)]),
        ("stopped", [("mark_preempting",), ("finish", 1), ("teardown", 1)]),
        ("failed", [("finish", 1), ("teardown", 1)]),
    ],
)
def test_the_outcome_is_wandbs_state(wandb, tmp_path, outcome, calls) -> None:
    tracker = opened(tmp_path)
    tracker.close(outcome)
    assert tracker._run.calls[3:] == calls


def test_wandbs_hook_for_errors_is_not_kept(wandb, tmp_path) -> None:
    hook = sys.excepthook
    opened(tmp_path)
    assert sys.excepthook is hook
