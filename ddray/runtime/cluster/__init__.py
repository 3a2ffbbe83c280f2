"""The Ray that a job runs on, and whether it can: nodes, capacity, the doctor, its files."""
