"""`longctx` as a rank of a job, in which a step waits: `python -m tests.e2e.held train …`, see `a_step_that_waits`."""

from longctx.launch.main import main
from tests.e2e.entries import a_step_that_waits

if __name__ == "__main__":
    with a_step_that_waits():
        main()
