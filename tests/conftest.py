"""What all tests share: hypothesis without a deadline, since a loaded machine is no failure; helpers whose assertions
say what they compared."""

import pytest
from hypothesis import settings

pytest.register_assert_rewrite("attempts", "drill", "helpers")

settings.register_profile("raylaunch", deadline=None)
settings.load_profile("raylaunch")
