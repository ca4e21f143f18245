"""What the papers measure of a trained network besides its accuracy. docs/analysis.md says what each number means.

The functions take any ``nn.Module`` from images in [0, 1], ``(B, C, H, W)``, to logits ``(B, K)``, and give a value an
image, so that the mean over a group of classes is the caller's.
"""
