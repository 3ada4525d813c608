"""This machine: CPUs, ports, addresses, processes, locks."""
