"""Data sets in shards: plan, commit, resume, verify; trajectories and images are sisters."""
