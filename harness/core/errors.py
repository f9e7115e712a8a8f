"""The errors that end a command in one sentence."""

from __future__ import annotations


class UserError(Exception):
    """A mistake in what the user gave: one sentence that names the thing and the remedy; exit code 2, no traceback."""


class RunError(Exception):
    """A failure that is not the user's mistake, such as a loss that is not finite; exit code 1, no traceback."""


class UnusableImages(UserError):  # noqa: N818  told like any other mistake
    """A training cannot go on with the pictures as they are; what it has learnt so far is saved first."""
