"""Distribution under which this package is installed, and another one of the same import name."""

from importlib.metadata import PackageNotFoundError, version

NAME = "longctx-training"
"""Name of this distribution: `longctx` is another project's, whose package has the same import name."""


def foreign_distribution() -> str | None:
    """Return what is wrong if the environment has the distribution `longctx`, else None.

    Which of its files and ours are imported then depends on the order of the installs.
    """
    try:
        other = version("longctx")
    except PackageNotFoundError:
        return None
    return (
        f"this environment has the distribution longctx {other}, whose files are imported under the same name as those "
        f"of {NAME}, this program: uninstall both (pip uninstall longctx {NAME}), then install {NAME} again"
    )
