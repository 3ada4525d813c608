"""Why a run, a job or somebody's log ended as it did: one verdict, on evidence.

`log_lines`: files → lines that know where they stand and whose they are. `rules`: what lines mean. `verdict`: the first
cause among them, and what was only its cascade. `run`: the same for a run of ours, whose events know more.
"""
