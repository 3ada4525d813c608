"""What all tests share: hypothesis without a deadline, since a loaded machine is no failure."""

from hypothesis import settings

settings.register_profile("raylaunch", deadline=None)
settings.load_profile("raylaunch")
