"""Published architectures, one file each, and `zoo`, which knows their names, sizes and checkpoint layouts."""
