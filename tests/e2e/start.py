"""`longctx` with ranks that run a function of `tests.e2e.entries`: `python -m tests.e2e.start FUNCTION train …`."""

import sys
from unittest.mock import patch

from longctx.launch import local, main, train


def _start() -> None:
    entry = sys.argv.pop(1)

    def run_ranks(function: str, *arguments: object, **options: object) -> int:
        return local.run_ranks(f"tests.e2e.entries:{entry}", *arguments, **options)

    with patch.object(train, "run_ranks", run_ranks):
        main.main()


if __name__ == "__main__":
    _start()
