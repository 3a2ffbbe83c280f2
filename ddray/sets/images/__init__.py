"""Image sets: what a student makes of the noise of (seed, index)."""
