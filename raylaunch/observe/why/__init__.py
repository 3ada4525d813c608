"""Why a run or a job failed, also from the log of another launcher: one verdict, with its evidence.

`log_lines`: files → lines with their position, rank and host. `rules`: the meaning of lines. `verdict`: the first cause
among them, and its consequences. `run`: the same for a raylaunch run, whose events contain more.
"""
