"""Meshes, and compiling for machines that are not there."""
