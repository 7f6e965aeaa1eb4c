"""Ops for CPUs: linear layers by oneDNN, depthwise convolutions, scans along rows and columns of images."""
