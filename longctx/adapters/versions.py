"""Version checks of the adapted frameworks: each adapter refuses versions that it was not tested with."""

from dataclasses import dataclass
from importlib import import_module

from packaging.version import Version


class UnsupportedVersionError(ImportError):
    """The framework is not installed, or its version was not tested with the adapter."""


@dataclass(frozen=True)
class TestedVersions:
    """The versions of a package that an adapter was tested with, and the extra that installs them."""

    package: str
    module: str
    """The module with `__version__`; it may be a checkout, which is not installed."""
    oldest: str
    newest: str
    """The newest release line, `0.16` or `1.2`; its patch releases count as tested."""
    extra: str

    def check(self) -> None:
        """Raise UnsupportedVersionError if the package is missing, or older or newer than the tested versions."""
        tested = f"longctx was tested with {self.package} {self.oldest} to {self.newest}"
        install = f"pip install -e '.[{self.extra}]'"
        try:
            installed = Version(import_module(self.module).__version__)
        except ModuleNotFoundError as error:
            raise UnsupportedVersionError(f"{self.package} is not installed: {install}") from error
        release, newest = installed.release, Version(self.newest).release
        if release < Version(self.oldest).release or release[: len(newest)] > newest:
            raise UnsupportedVersionError(f"this is {self.package} {installed}, and {tested}: {install}")
