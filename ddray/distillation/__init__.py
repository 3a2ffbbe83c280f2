"""How a student learns, in plain torch: losses, one step, and the data it reads."""
