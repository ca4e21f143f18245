"""Float64 references of PGD and of its objectives, written from the formulas."""

import torch

from helpers.toy_networks import double


def pgd_float64(net, x, start, score, config):
    """Return the adversarial examples that ascend ``score(logits)`` from ``start``."""
    net, x, x_adv = double(net).eval(), x.double(), start.double()
    for _ in range(config.steps):
        point = x_adv.clone().requires_grad_()
        score(net(point)).backward()
        moved = x_adv + config.step_size * point.grad.sign()
        x_adv = (x + (moved - x).clamp(-config.eps, config.eps)).clamp(0, 1)
    return x_adv


def ce64(y):
    """Cross-entropy, summed over the batch."""
    return lambda logits: -logits.log_softmax(1)[torch.arange(len(y)), y].sum()


def cw64(y):
    """Largest wrong logit minus true logit, summed over the batch."""

    def score(logits):
        rows = [torch.cat([row[:c], row[c + 1 :]]).max() - row[c] for row, c in zip(logits, y.tolist(), strict=True)]
        return torch.stack(rows).sum()

    return score


def scaled64(y):
    """Cross-entropy of logits divided by the gap of the two largest, summed over the batch."""

    def score(logits):
        gaps = [(row.max() - row.sort().values[-2]).item() for row in logits]
        return ce64(y)(torch.stack([row / gap for row, gap in zip(logits, gaps, strict=True)]))

    return score
