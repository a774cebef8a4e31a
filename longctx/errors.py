"""User errors: mistakes in arguments, recipes and input files."""


class UserError(ValueError):
    """A mistake that the user can fix; the message names what is wrong, where, and what to do instead.

    The command line prints only the message, without a traceback, and exits with status 2.
    """
