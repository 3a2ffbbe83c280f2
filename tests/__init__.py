"""The tests. A package with a file of its own: installed ones called `tests` would hide it else."""
