"""Measurements from the papers on trained networks, other than accuracy; docs/analysis.md explains each number.

The functions take any ``nn.Module`` from images in [0, 1], ``(B, C, H, W)``, to logits ``(B, K)``. They return one
value per image, so that the caller can average over any group of classes.
"""
