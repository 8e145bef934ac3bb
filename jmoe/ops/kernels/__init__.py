"""Kernels for Hopper GPUs, in Pallas's Mosaic dialect."""
