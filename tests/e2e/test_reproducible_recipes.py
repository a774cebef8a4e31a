"""`parallel.reproducible` with the recipe that everybody starts with: one checkpoint, to the bit, on 1 to 8 ranks."""

import pytest
import torch

from tests.train.runs import interrupted_copy, losses, tensors, train_recipe, write_corpus

SHORT = (
    "parallel.reproducible=8",
    "data.sequence_length=512",
    "train.steps=4",
    "schedule.warmup=1",
    "schedule.decay=2",
    "checkpoint.every=2",
    "checkpoint.keep=2",
    "evaluation.sequences=1",
    "logging.every=1",
    "logging.tensorboard=false",
)

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # of `tensors`


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_the_quickstart_ends_with_the_same_checkpoint_on_any_number_of_processes(eight_ranks, tmp_path, precision):
    corpus = write_corpus(tmp_path / "corpus")

    def checkpoint(size, out):
        overrides = [*SHORT, f"data.path={corpus}", f"train.precision={precision}", f"parallel.cp={size}"]
        eight_ranks.run(train_recipe, "quickstart", out, overrides, size=size)
        return losses(out), tensors(out / "checkpoints" / "step-00000004")

    want_losses, want = checkpoint(1, tmp_path / "1")
    for size in (2, 4, 8):
        out = tmp_path / str(size)
        found_losses, found = checkpoint(size, out)
        assert found_losses == want_losses
        assert {name for name, x in want.items() if not torch.equal(x, found[name])} == set()
        # Stopped after two steps, and resumed on half as many processes.
        _, resumed = checkpoint(size // 2, interrupted_copy(out, tmp_path / f"{size} then {size // 2}", 2))
        assert {name for name, x in want.items() if not torch.equal(x, resumed[name])} == set()
    assert len(want) > 50
