"""The training loop around Hugging Face's MiniMax is of the quickstart's size."""

from benchmarks import minimax_loop
from tests.compare.peers import peer

peer("transformers.models.minimax.modeling_minimax")


def test_the_loop_is_of_the_quickstarts_size_and_times_each_step_after_the_first_two(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["minimax_loop", "--tokens", "64", "--steps", "2", "--threads", "1"])
    minimax_loop.main()
    text = capsys.readouterr().out
    parameters = int(text.split()[0].replace(",", ""))
    assert abs(parameters - 927_000) < 5_000
    assert text.endswith("tokens/s\n")
    assert "64 tokens per step" in text
