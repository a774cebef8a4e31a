"""`longctx generate`: what is written, what is said, and its exit status."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from longctx.launch import generate as command
from longctx.launch.main import app
from tests.train.runs import train, write_corpus, write_workplace


@pytest.fixture(scope="module")
def trained(ranks, tmp_path_factory) -> Path:
    workplace = write_workplace(tmp_path_factory.mktemp("workplace"))
    ranks.run(train, workplace, workplace / "run", ("parallel.cp=1", "train.steps=2", "checkpoint.every=1"), size=1)
    return workplace / "run"


def run(*arguments):
    """Exit status, stdout and stderr."""
    result = CliRunner().invoke(app, ["generate", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def test_text_goes_to_stdout_and_the_rest_to_stderr(trained):
    status, text, said = run(trained, "--prompt", "12 13 14", "--tokens", "40", "--top-p", "0.5")
    assert status == 0
    assert len(text) > 20
    assert text.endswith("\n")
    assert said.startswith(f"{trained}/checkpoints/step-00000002, float32 on cpu; prompt of 8 tokens\n40 tokens (")
    assert " s to first token, then " in said


def test_the_seed_and_the_checkpoint_decide(trained):
    def text(*options):
        return run(trained, "--prompt", "12 13 14", "--tokens", "30", *options)[1]

    assert text() == text("--seed", "0") == text("--checkpoint", trained / "checkpoints/step-00000002")
    assert text("--seed", "1") != text()
    assert text("--temperature", "0", "--seed", "1") == text("--temperature", "0") == text("--top-k", "1")
    assert text("--checkpoint", trained / "checkpoints/step-00000001") != text()


@pytest.fixture
def threads(monkeypatch):
    """The numbers of threads that are set, on a machine with 8 cores."""
    numbers = []
    monkeypatch.setattr(torch, "set_num_threads", numbers.append)
    monkeypatch.setattr(command, "threads_per_rank", lambda ranks: 8 // ranks)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return numbers


def test_little_work_is_done_by_one_thread_and_much_by_all_cores(threads, monkeypatch):
    def decoder(parameters, device="cpu"):
        rows = torch.empty(parameters, device="meta")
        weight = SimpleNamespace(device=torch.device(device))
        return SimpleNamespace(head_weight=weight, parameters=lambda: iter([rows]))

    for parameters, tokens in ((10**6, 1), (2**28, 1), (2**28 + 1, 1), (10**6, 268), (10**6, 269)):
        command.set_threads(decoder(parameters), tokens)
    assert threads == [1, 1, 8, 1, 8]
    command.set_threads(decoder(10**9, "cuda"), 1)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    command.set_threads(decoder(10**9), 1)
    assert len(threads) == 5


def test_prefill_and_decoding_have_threads_of_their_own(trained, threads, monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setattr(command, "ONE_THREAD", 10**5)  # parameters times 8 tokens are more, times one fewer
    assert run(trained, "--prompt", "12 13 14", "--tokens", "3")[0] == 0
    assert threads == [8, 1, before]


def test_a_prompt_may_come_from_a_file(trained, tmp_path):
    (tmp_path / "prompt.txt").write_text("12 13 14 é")
    options = ("--tokens", "1Ki", "--seed", "2", "train.device=cpu")
    from_file = run(trained, "--prompt-file", tmp_path / "prompt.txt", *options)
    assert from_file[0] == 0
    assert "; prompt of 11 tokens" in from_file[2]
    assert from_file[1] == run(trained, "--prompt", "12 13 14 é", *options)[1]


def test_the_models_end_of_the_document_ends_the_text(trained, monkeypatch):
    monkeypatch.setattr(command, "generate", lambda *arguments, **options: iter([104, 105]))
    status, text, said = run(trained, "--prompt", "12", "--tokens", "30")
    assert (status, text) == (0, "hi\n")
    assert "2 tokens (" in said
    assert said.endswith("; stopped at the end-of-document token\n")


def test_the_tokenizers_end_and_size_bound_what_is_drawn(trained, monkeypatch):
    called = []
    monkeypatch.setattr(command, "generate", lambda *arguments, **options: called.append(options) or iter([]))
    assert run(trained, "--prompt", "12")[1] == "\n"
    assert called == [{"stop": (256,), "vocabulary": 257}]


def test_another_corpus_is_warned_of(trained, tmp_path):
    write_corpus(tmp_path / "corpus", salt=1)
    options = ("--prompt", "1", "--tokens", "2")
    warning = "is not the one that this checkpoint was trained on"
    assert warning in run(trained, f"data.path={tmp_path / 'corpus'}", *options)[2]
    assert warning not in run(trained, *options)[2]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "error: prompt: give either --prompt TEXT or --prompt-file FILE"),
        (("--prompt", "a", "--prompt-file", "b"), "error: prompt: give either"),
        (("--prompt", ""), "error: the prompt is empty"),
        (("--prompt-file", "gone"), "error: --prompt-file gone: No such file"),
        (("--prompt", "a", "--tokens", "0"), "error: --tokens 0: expected at least 1"),
        (("--prompt", "a", "--tokens", "many"), "error: --tokens: 'many' is not an integer"),
        (("--prompt", "a", "--temperature", "-1"), "error: temperature: -1.0 is out of range"),
        (("--prompt", "a", "--top-p", "0"), "error: top_p: 0.0 is out of range"),
        (("--prompt", "a", "--checkpoint", "gone"), "error: gone is not a checkpoint, or it is damaged"),
        (("--prompt", "a", "model.dim=32"), "error: model.dim=32: generation can override only checkpoint.verify"),
        (("--prompt", "a", "train.precision=fp8"), "train.precision: "),
    ],
)
def test_a_mistake_is_its_message_and_status_2(trained, arguments, words):
    status, text, said = run(trained, *arguments)
    assert (status, text) == (2, "")
    assert words in said
    assert "Traceback" not in said


def test_a_prompt_that_is_no_text_is_reported(trained, tmp_path):
    (tmp_path / "prompt").write_bytes(b"ab\xff")
    status, _, said = run(trained, "--prompt-file", tmp_path / "prompt")
    assert status == 2
    assert f"--prompt-file {tmp_path / 'prompt'}: not UTF-8 text (invalid start byte at byte 2)" in said
    status, _, said = run(trained, "--prompt", "ab\udcff")
    assert (status, said) == (2, "error: --prompt: not UTF-8 text (at character 2)\n")
