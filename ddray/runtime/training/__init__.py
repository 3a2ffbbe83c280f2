"""Distillation on Ray Train and DeepSpeed: the driver, its workers, what goes wrong."""
