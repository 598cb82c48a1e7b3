"""Errors a user can cause: each message is one line that says what, what was given, where, and what to do."""


class MobazooError(Exception):
    """Base of every error that mobazoo raises on purpose; the command line prints it and exits with 2."""


class InputError(MobazooError, ValueError):
    """A value, shape, dtype or file that cannot be used as given."""


class Stopped(MobazooError):  # noqa: N818  (nothing is wrong)
    """A run that was asked to stop, and left what it needs to go on."""


class UnsupportedError(MobazooError, NotImplementedError):
    """A request that is well formed but that the chosen backend, model or platform cannot carry out."""
