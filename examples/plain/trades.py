"""TRADES (Zhang et al. 2019) on the scikit-learn digits."""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits


def trades_loss(model, x, y, eps=0.1, step_size=0.025, steps=10, beta=6.0):
    """Cross-entropy on clean images plus beta times KL(clean || adversarial)."""
    model.eval()
    p_clean = model(x).softmax(1).detach()
    x_adv = x + 0.001 * torch.randn_like(x)
    for _ in range(steps):
        x_adv.requires_grad_()
        divergence = F.kl_div(model(x_adv).log_softmax(1), p_clean, reduction="sum")
        (grad,) = torch.autograd.grad(divergence, x_adv)
        x_adv = torch.clamp(torch.min(torch.max(x_adv.detach() + step_size * grad.sign(), x - eps), x + eps), 0, 1)
    model.train()
    logits = model(x)
    robust = F.kl_div(model(x_adv).log_softmax(1), logits.softmax(1), reduction="batchmean")
    return F.cross_entropy(logits, y) + beta * robust


def main(epochs=5):
    torch.manual_seed(0)
    images, labels = (torch.tensor(array) for array in load_digits(return_X_y=True))
    images = (images / 16).float()
    model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for epoch in range(epochs):
        for batch in torch.randperm(1500).split(100):
            loss = trades_loss(model, images[batch], labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        accuracy = (model(images[1500:]).argmax(1) == labels[1500:]).float().mean()
        print(f"epoch {epoch}: loss {loss:.3f}, test accuracy {accuracy:.1%}")


if __name__ == "__main__":
    main()
