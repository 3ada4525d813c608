"""The node loop: facts from the scheduler, one decision (`policy`, pure), jobs submitted or cancelled."""
