"""The one exception that means: the user can mend this, and the message says how."""


class UserError(ValueError):
    """Bad input. `str(error)` is the whole message: key, value, why, and what to set instead."""
