"""Progress of a long run of tests, in place of pytest's dots: counts, time and files, and failures as they happen."""

import time

import pytest


class Progress:
    """Prints a line per 5 % of the tests, or per minute where that is sooner, and each failure when it happens."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.began = self.printed_at = time.monotonic()
        self.total = self.done = self.printed = 0
        self.failed: set[str] = set()
        self.files: dict[object, str] = {}
        """Per worker, the file of its last test."""
        self.in_report = False

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Without workers."""
        self.total = self.total or len(session.items)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: object, ids: list[str]) -> None:
        """With workers, each of which collects all tests."""
        if not self.total:
            self._print(f"{len(ids)} tests")
        self.total = len(ids)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> object:
        self.in_report = True
        try:
            result = yield
        finally:
            self.in_report = False
        self.files[getattr(report, "node", None)] = report.location[0]
        if report.failed:
            self.failed.add(report.nodeid)
            crash = getattr(report.longrepr, "reprcrash", None)
            reason = str(getattr(crash, "message", "")).partition("\n")[0]
            self._print(f"FAILED {report.nodeid} ({report.when}) {reason}"[:240])
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_report_teststatus(self) -> object:
        """Leave out the letter of a test where the test is reported; summaries keep their words."""
        category, letter, word = yield
        return (category, "", "") if self.in_report else (category, letter, word)

    def pytest_runtest_logfinish(self) -> None:
        self.done += 1
        now = time.monotonic()
        percent = 100 * self.done // max(1, self.total)
        if percent >= self.printed + 5 or now > self.printed_at + 60:
            self.printed, self.printed_at = percent - percent % 5, now
            minutes, seconds = divmod(int(now - self.began), 60)
            counts = (
                f"{percent:3}%  {self.done} of {self.total} tests, {len(self.failed)} failed, {minutes}:{seconds:02}"
            )
            self._print(f"{counts}, at {', '.join(sorted(set(self.files.values())))}")

    def _print(self, line: str) -> None:
        terminal = self.config.pluginmanager.getplugin("terminalreporter")
        terminal.ensure_newline()
        terminal.write_line(line)
