"""Faults on purpose: a seeded plan of them, doing and undoing each, and what a large cluster would make of it."""
