"""Reading a recipe: files that extend each other, overrides, and one message for everything that is wrong."""

from typing import Annotated, Literal

import pytest
from pydantic import Field, model_validator

from longctx.config import Config, Integer
from longctx.errors import UserError
from longctx.recipe import sources
from longctx.recipe.loading import load_as
from longctx.recipe.tables import EvaluationConfig, LRScheduleConfig, OptimizerConfig, ParallelConfig, TrainConfig


class Lightning(Config):
    kind: Literal["lightning"]
    head_dim: Integer


class Softmax(Config):
    kind: Literal["softmax"]
    rotary: float


class Model(Config):
    layers: str = "LS"
    depth: Integer = 4
    mixers: dict[str, Annotated[Lightning | Softmax, Field(discriminator="kind")]] = Field(default_factory=dict)

    @property
    def mixture(self) -> None:
        """No experts."""

    @model_validator(mode="after")
    def _fits(self) -> "Model":
        problems = ["layers: give a pattern"] if not self.layers else []
        for name, mixer in self.mixers.items():
            if isinstance(mixer, Lightning) and mixer.head_dim % 2:
                problems.append(f"mixers.{name}.head_dim: {mixer.head_dim} is odd; this matters: rotary turns pairs")
        if problems:
            raise ValueError("; ".join(problems))
        return self


class Data(Config):
    sequence_length: Integer = 4096


class Run(Config):
    name: str = "run"
    model: Model = Model()
    data: Data = Data()
    train: TrainConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: LRScheduleConfig = LRScheduleConfig()
    parallel: ParallelConfig = ParallelConfig()
    evaluation: EvaluationConfig = EvaluationConfig(every=10)


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(name, text):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return name

    return write


def load(source, *overrides):
    return load_as(Run, source, overrides)


def mistakes(source, *overrides):
    """The lines of the error, without the heading that counts them."""
    with pytest.raises(UserError) as caught:
        load(source, *overrides)
    lines = str(caught.value).split("\n")
    if len(lines) == 1:
        return lines
    assert lines[0] == f"{len(lines) - 1} mistakes in the recipe:"
    return [line.strip() for line in lines[1:]]


# Values


def test_values_are_read_as_the_configuration_wants_them(write):
    run = load(write("r.toml", "[train]\nsteps = '2Ki'\nclip = 1\n[optimizer]\nbetas = [0, 0.5]\nlr = 1\n"))
    assert run.train.steps == 2048
    assert run.train.clip == 1.0
    assert run.optimizer.betas == (0.0, 0.5)
    assert isinstance(run.optimizer.lr, float)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("lr = '3'", "optimizer.lr: should be a number, not '3'"),
        ("lr = true", "optimizer.lr: should be a number, not true"),
        ("lr = 0", "optimizer.lr: should be greater than 0, not 0"),
        ("betas = [0.9]", "optimizer.betas[1]: missing"),
        ("betas = [1, 0.9]", "optimizer: betas must be in [0, 1), not (1.0, 0.9)"),
        ("betas = [1, 2, 3]", "optimizer.betas: should have at most 2 items, not 3"),
        ("betas = ['a', 0.9]", "optimizer.betas[0]: should be a number, not 'a'"),
        ("betas = {a = 1}", "optimizer.betas: should be a list, not a table"),
        ("lr = 2020-01-01", "optimizer.lr: a recipe cannot have dates or times; use quotes if it is text"),
    ],
)
def test_wrong_values_are_never_converted(write, line, complaint):
    found = mistakes(write("r.toml", f"train.steps = 1\n[optimizer]\n{line}\n"))
    assert any(mistake.endswith(complaint) for mistake in found), found


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("train.steps = true", "train.steps: should be an integer, not true"),
        ("train.steps = 3.0", "train.steps: should be an integer, not 3.0"),
        (
            "train.steps = 'many'",
            "train.steps: 'many' is not an integer; write 4096, '4_096', '4Ki' (4096) or '4k' (4000)",
        ),
        ("train = 3", "train: should be a table, not 3"),
        (
            "train = {steps = 1, precision = 'bf15'}",
            "train.precision: should be 'bf16' or 'fp32', not 'bf15'; did you mean 'bf16'?",
        ),
        ("train = {steps = 1, clip = -1}", "train.clip: should be greater than 0 or 'none', not -1"),
        (
            "train = {steps = 1, clip = 'non'}",
            "train.clip: should be a number or 'none', not 'non'; did you mean 'none'?",
        ),
        ("train = {steps = 1, deterministic = 1}", "train.deterministic: should be true or false, not 1"),
    ],
)
def test_a_wrong_value_says_what_would_be_right(write, line, complaint):
    assert mistakes(write("r.toml", f"\n{line}\n")) == [f"r.toml:2: {complaint}"]


# Keys


def test_every_mistake_is_in_one_message_with_its_line(write):
    write("base.toml", "[parallel]\ncp = 0\n\n[schedule]\nkind = 'wsd'\n")
    write("r.toml", "extends = 'base.toml'\n[train]\nstpes = 3\nprecision = 'fp33'\n[evaluation]\n")
    assert mistakes("r.toml", "optimizer.lr=fast", "speed=1", "oops") == [
        "base.toml:2: parallel.cp: should be greater than 0, not 0",
        "base.toml:4: schedule: kind = 'wsd' needs decay, the number of steps of the final decay",
        "r.toml:3: train.stpes: unknown key; did you mean 'steps'?",
        "r.toml:4: train.precision: should be 'bf16' or 'fp32', not 'fp33'; did you mean 'fp32'?",
        "r.toml:5: evaluation.every: missing",
        "command line: optimizer.lr: should be a number, not 'fast'",
        "command line: speed: unknown key; a recipe has "
        "name, model, data, train, optimizer, schedule, parallel, evaluation",
        "command line: 'oops' should be key=value, such as train.steps=100",
    ]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("[trian]", "trian: unknown key; did you mean 'train'?"),
        ("[optimizer]\nweightdecay = 1", "optimizer.weightdecay: unknown key; did you mean 'weight_decay'?"),
        ("[schedule]\nlr = 1", "schedule.lr: unknown key; did you mean 'optimizer.lr'?"),
        ("[schedule]\nsequences", "schedule.sequences: unknown key; did you mean 'evaluation.sequences'?"),
        ("[parallel]\nevry", "parallel.evry: unknown key; did you mean 'evaluation.every'?"),
        ("[optimizer]\nmomentum", "optimizer.momentum: unknown key; [optimizer] has lr, betas, eps, weight_decay"),
    ],
)
def test_the_nearest_right_key_is_named(write, line, complaint):
    text = line if "[tr" in line or "=" in line else f"{line} = 1"
    train = "" if "[trian]" in line else "[train]\nsteps = 5\n"
    (mistake,) = mistakes(write("r.toml", f"{train}{text}\n"))
    assert mistake.partition(": ")[2] == complaint


def test_a_missing_key_is_named_with_the_table_that_lacks_it(write):
    assert mistakes(write("r.toml", "\n\n[train]\n")) == ["r.toml:3: train.steps: missing"]
    assert mistakes(write("r.toml", "name = 'x'\n")) == ["r.toml: train: missing"]


def test_keys_of_a_union_are_those_of_its_kind(write):
    mixer = "[train]\nsteps = 1\n[model.mixers.L]\nkind = "
    assert mistakes(write("r.toml", f"{mixer}'lightning'\nhed_dim = 3\n")) == [
        "r.toml:5: model.mixers.L.hed_dim: unknown key; did you mean 'head_dim'?"
    ]
    assert mistakes(write("r.toml", f"{mixer}'softmax'\nhead_dim = 3\nrotary = 1.0\n")) == [
        "r.toml:5: model.mixers.L.head_dim: unknown key; [model.mixers.L] has kind, rotary"
    ]
    assert mistakes(write("r.toml", f"{mixer}'softmax'\n")) == ["r.toml:3: model.mixers.L.rotary: missing"]


def test_what_a_table_says_of_its_own_keys_has_their_lines(write):
    write("r.toml", "train.steps = 1\n[model]\nlayers = ''\n[model.mixers.L]\nkind = 'lightning'\nhead_dim = 3\n")
    assert mistakes("r.toml") == [
        "r.toml:3: model.layers: give a pattern",
        "r.toml:6: model.mixers.L.head_dim: 3 is odd; this matters: rotary turns pairs",
    ]


# Files


def test_a_recipe_extends_another_table_by_table(write):
    write("deep/base.toml", "name = 'base'\n[train]\nsteps = 5\nclip = 0.5\n[data]\nsequence_length = 8\n")
    write("deep/middle.toml", "extends = 'base.toml'\n[train]\nsteps = 6\n")
    run = load(write("r.toml", "extends = 'deep/middle.toml'\nname = 'child'\n[data]\nsequence_length = '1Ki'\n"))
    assert (run.name, run.train.steps, run.train.clip, run.data.sequence_length) == ("child", 6, 0.5, 1024)


def test_shipped_recipes_are_found_by_name(write, tmp_path, monkeypatch):
    write("shipped/quickstart.toml", "extends = 'tiny'\n[train]\nsteps = 7\n")
    write("shipped/tiny.toml", "train.steps = 1\nname = 'tiny'\n")
    monkeypatch.setattr(sources, "shipped_folder", lambda: tmp_path / "shipped")
    assert load("quickstart").train.steps == 7
    assert load("quickstart").name == "tiny"
    assert load(write("r.toml", "extends = 'quickstart'\n")).train.steps == 7
    assert mistakes("quikstart") == [
        "longctx ships no recipe 'quikstart'; did you mean 'quickstart'? The path of a recipe file must end in .toml"
    ]


def test_files_that_cannot_be_read_are_named(write, tmp_path):
    assert mistakes("none.toml") == ["none.toml: no such file"]
    assert mistakes(write("r.toml", "\nextends = 'gone.toml'\n")) == ["r.toml:2: extends: gone.toml: no such file"]
    assert mistakes(write("r.toml", "extends = 3\n")) == [
        "r.toml:1: extends: should be the path of a recipe or the name of a shipped one, not 3"
    ]
    (tmp_path / "latin.toml").write_bytes(b"name = '\xe9'\n")
    assert mistakes("latin.toml") == ["latin.toml: is not UTF-8 text (byte 8)"]


def test_recipes_that_extend_each_other_in_a_circle_are_refused(write):
    write("a.toml", "extends = 'b.toml'\n")
    write("b.toml", "name = 'b'\nextends = './a.toml'\n")
    assert mistakes("a.toml") == ["b.toml:2: extends: recipes extend each other in a cycle: a.toml → b.toml → a.toml"]


@pytest.mark.parametrize(
    ("text", "line"),
    [("a = 1\nb = = 2\n", 2), ("a = 1\na = 2\n", 2), ("a = 1\n\nb = [1,\n", 3), ("[t]\nx = 'abc\n", 2)],
)
def test_a_syntax_error_has_its_line(write, text, line):
    (mistake,) = mistakes(write("r.toml", text))
    assert mistake.startswith(f"r.toml:{line}: not valid TOML: ")


# Overrides


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("train.steps=64Ki", 65536),
        ("train.steps=3_000", 3000),
        ("train.precision=bf16", "bf16"),
        ('train.precision="bf16"', "bf16"),
        ("train.deterministic=false", False),
        ("train.clip=none", "none"),
        ("optimizer.betas=[0.5, 0.6]", (0.5, 0.6)),
        ("name=a=b", "a=b"),
        ("name=", ""),
        ("name=one\ntwo=2", "one\ntwo=2"),
        ("model={layers='L'}", Model(layers="L")),
    ],
)
def test_an_override_is_a_toml_value_or_else_a_word(write, override, value):
    found = load(write("r.toml", "[train]\nsteps = 1\n"), override)
    for part in override.partition("=")[0].split("."):
        found = getattr(found, part)
    assert found == value


def test_overrides_win_over_files_and_later_ones_over_earlier(write):
    write("r.toml", "[train]\nsteps = 1\nclip = 0.5\n")
    run = load("r.toml", "train.steps=2", "train={steps=3}", "train.steps=4")
    assert (run.train.steps, run.train.clip) == (4, 0.5)


def test_a_mistake_of_an_override_is_not_blamed_on_the_file(write):
    write("r.toml", "[train]\nsteps = 1\nclip = 0.5\n")
    assert mistakes("r.toml", "train.steps=0") == ["command line: train.steps: should be greater than 0, not 0"]
    assert mistakes("r.toml", "train={steps=0}") == ["command line: train.steps: should be greater than 0, not 0"]
    assert mistakes("r.toml", "train.steps.x=1") == ["command line: train.steps: should be an integer, not a table"]


@pytest.mark.parametrize("override", ["train.steps", "=3", "a b=3", "train.=3", "a=1\nb"])
def test_a_malformed_override_is_named(write, override):
    found = mistakes(write("r.toml", "[train]\nsteps = 1\n"), override)
    if override != "a=1\nb":
        assert found == [f"command line: {override!r} should be key=value, such as train.steps=100"]
    else:
        assert found[0].startswith("command line: a: unknown key")


# Between tables
