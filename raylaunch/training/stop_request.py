"""What a driver or a person can ask a trainer for, as `Session.stop_requested` answers it; 0: nothing."""

AT_COMMIT, NOW = 1, 2
"""End after the next regular save (the run resizes), or save at this step and end."""
