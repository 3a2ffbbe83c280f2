"""The only package that imports ray and deepspeed: clusters, pools, training and serving."""
