"""Trajectory sets: the tokens to which a teacher carries the noise of (seed, index)."""
