"""What every module here has."""

from __future__ import annotations

import pytest
from drill import Drill


@pytest.fixture(scope="module")
def reference(drill: Drill) -> dict[int, float]:
    """The losses of a run that nothing happened to, on the module's cluster."""
    return drill.smooth()
