"""What runs of a process share."""

import pytest

from common.datasets import pools


@pytest.fixture(scope="module")
def photographs():
    """Cut into patches once for all runs of a module."""
    made = pools.photographs()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pools, "photographs", lambda: made)
        yield
