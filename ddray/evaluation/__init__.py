"""A student beside its teacher: the measurements and the page."""
