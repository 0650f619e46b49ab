"""The two exceptions that end a command with a readable line instead of a traceback."""


class UserError(Exception):
    """Something the user can mend: one line that names the thing and the cure (exit status 2)."""


class Interrupted(Exception):
    """The run stopped before its end but its directory can be resumed (exit status 3)."""


def require(condition: bool, message: str) -> None:
    """Checks one condition on what the user gave.

    Args:
        condition: what must hold.
        message: one line that names the thing and the cure.

    Raises:
        UserError: if the condition does not hold.
    """
    if not condition:
        raise UserError(message)
