"""Processes: who is who, sums over all of them, and randomness that does not depend on how many there are."""
