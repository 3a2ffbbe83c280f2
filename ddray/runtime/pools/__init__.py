"""Actors that fill a set: trajectories by teachers, images by students."""
