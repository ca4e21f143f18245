"""A PGD attack with torchattacks' interface: attack = PGD(model); x_adv = attack(images, labels)"""

import torch
import torch.nn.functional as F


class PGD:
    """L_inf PGD (Madry et al. 2018) on a classifier of images in [0, 1]."""

    def __init__(self, model, eps=8 / 255, alpha=2 / 255, steps=10):
        self.model, self.eps, self.alpha, self.steps = model, eps, alpha, steps

    def __call__(self, images, labels):
        adv_images = (images + torch.empty_like(images).uniform_(-self.eps, self.eps)).clamp(0, 1)
        for _ in range(self.steps):
            adv_images.requires_grad_()
            cost = F.cross_entropy(self.model(adv_images), labels)
            (grad,) = torch.autograd.grad(cost, adv_images)
            delta = torch.clamp(adv_images.detach() + self.alpha * grad.sign() - images, -self.eps, self.eps)
            adv_images = torch.clamp(images + delta, 0, 1)
        return adv_images
