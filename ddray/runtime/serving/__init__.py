"""The image service on Ray Serve: proxy, ingress, replicas."""
