"""Loop 1: keep N Ray nodes alive.

up, down     a cluster's begin and end, from the login node
agent/       the process on each node: its Ray, its supervisor
membership/  the connection between agents; who leads
head/        what the leading agent does for all
node_loop/   wanted against living nodes: `policy` (pure) decides, `node_loop` does
telemetry/   what nodes are busy with
"""
