"""The command line as a user calls it, in this process."""

from __future__ import annotations

import pytest

from consilium import cli


def call(*words: object) -> int:
    """Exit code of a verb; what it printed is for `capsys`."""
    with pytest.raises(SystemExit) as ended:
        cli.main([str(word) for word in words])
    return int(ended.value.code or 0)
