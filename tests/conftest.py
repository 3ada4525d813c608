"""What all tests share: hypothesis without a deadline, since a loaded machine is no failure; helpers whose assertions
say what they compared."""

import pytest
from hypothesis import settings

pytest.register_assert_rewrite("attempts", "drill", "helpers")

settings.register_profile("raylaunch", deadline=None)
settings.load_profile("raylaunch")


@pytest.hookimpl(tryfirst=True)  # before xdist takes note of the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of one file run in one process, one after the other, and share its cluster; unless they say otherwise."""
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(str(item.path)))
