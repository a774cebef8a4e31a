"""Which versions of another framework an adapter was tested with."""

from dataclasses import dataclass
from importlib import import_module

from packaging.version import Version


class UnsupportedVersionError(ImportError):
    """Another framework is missing, or of a version that the adapter was not tested with."""


@dataclass(frozen=True)
class Tested:
    """The versions of a package that an adapter was tested with, and what installs it."""

    package: str
    module: str
    """What is imported of it, with its `__version__`; it may be a checkout, which is not installed."""
    oldest: str
    newest: str
    """The newest release line, `0.16` or `1.2`: its patches are taken to be the same."""
    extra: str

    def check(self) -> None:
        """Raise UnsupportedVersionError where the package is missing, or older or newer than what was tested."""
        wanted = f"longctx was tested with {self.package} {self.oldest} to {self.newest}"
        install = f"pip install 'longctx[{self.extra}]'"
        try:
            installed = Version(import_module(self.module).__version__)
        except ModuleNotFoundError as error:
            raise UnsupportedVersionError(f"{self.package} is not installed: {install}") from error
        release, newest = installed.release, Version(self.newest).release
        if release < Version(self.oldest).release or release[: len(newest)] > newest:
            raise UnsupportedVersionError(f"this is {self.package} {installed}, and {wanted}: {install}")
