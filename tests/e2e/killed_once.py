"""`longctx` whose rank 1 kills itself after the step 8, in the first start of its job only."""

import os
import signal
from typing import Any
from unittest.mock import patch

from longctx.launch.main import main
from longctx.train.trainer import _Trainer

_step = _Trainer._step


def _step_or_die(self: _Trainer, number: int, *others: Any) -> Any:
    if number == 8 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        self.checkpointer.wait()
        os.kill(os.getpid(), signal.SIGKILL)
    return _step(self, number, *others)


if __name__ == "__main__":
    with patch.object(_Trainer, "_step", _step_or_die):
        main()
