"""The errors that a user can cause."""


class UserError(ValueError):
    """A mistake that the user can mend: says what is wrong, where, and what to do instead.

    The command line prints its text alone, without a traceback, and exits with status 2.
    """
