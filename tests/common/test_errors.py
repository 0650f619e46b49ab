"""The check that turns a condition into a user error."""

import pytest

from common.errors import Interrupted, UserError, require


def test_require() -> None:
    require(True, "never seen")
    with pytest.raises(UserError, match="^name: what to do$"):
        require(False, "name: what to do")


def test_the_two_exits_are_told_apart() -> None:
    assert not issubclass(Interrupted, UserError)
    assert not issubclass(UserError, Interrupted)
