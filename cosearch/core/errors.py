"""The two ways in which things go wrong: the user's input is bad, or a candidate fails."""

import errno

NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""How a write fails where there is no room: on the disk, in the user's quota, or under a limit on a file's size."""


class UserError(Exception):
    """Bad input or surroundings; the message is for the user and names file, key and what is allowed."""


class Rejected(Exception):
    """A stage's refusal of a candidate; it becomes the `failure` of the candidate's trial."""


def first_line(error: BaseException) -> str:
    """What an error says, in one line; its kind where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
