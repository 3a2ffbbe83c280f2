"""Published architectures, one file each, and `zoo`: their names, sizes and checkpoint layouts."""
