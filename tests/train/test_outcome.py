"""The file that says that a signal stopped a run."""

from longctx.train.outcome import STOPPED, clear_outcome, mark_stopped


def test_it_lasts_from_the_stop_to_the_next_start(tmp_path):
    clear_outcome(tmp_path)
    mark_stopped(tmp_path, "after step 12")
    assert (tmp_path / STOPPED).read_text() == "after step 12\n"
    clear_outcome(tmp_path)
    assert not (tmp_path / STOPPED).exists()
