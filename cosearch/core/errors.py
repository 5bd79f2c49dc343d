"""The two ways in which things go wrong: the user's input is bad, or a candidate fails."""


class UserError(Exception):
    """Bad input or surroundings; the message is for the user and names file, key and what is allowed."""


class Rejected(Exception):
    """A stage's refusal of a candidate; it becomes the `failure` of the candidate's trial."""
