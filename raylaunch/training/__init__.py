"""Loop 2: keep a training function alive on the nodes that there are.

driver            the process; training_loop   facts, decision, attempt, again and again
policy (pure)     the decisions; attempt       one worker group, through Ray Train
attempt_monitor   what is watched beside it; hang_detector (pure)
worker/           the side of the workers
"""
