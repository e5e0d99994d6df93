"""The one exception that means "the user can fix this"."""


class UserError(Exception):
    """A mistake in what the user gave: one line that names the file, key or sample and what to do.

    The command line prints it without a traceback and exits with status 2.
    """


class DataError(RuntimeError):
    """Data that went bad under a running job: one line that names file and sample. The run fails with status 1."""
