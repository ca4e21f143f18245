"""Distillation on long-tailed digits with the balanced softmax."""

import torch
from sklearn.datasets import load_digits

from ltat_fast.ops import balanced_softmax_kl


def distillation_step(student, teacher, optimizer, x, y, counts, alpha=0.5, temperature=4.0):
    """Balanced cross-entropy plus alpha T^2 KL(teacher || student), and one step of the optimizer."""
    with torch.no_grad():
        teacher_logits = teacher(x)
    logits = student(x)
    kl_weight = alpha * temperature**2
    loss = balanced_softmax_kl(logits, y, counts, teacher_logits, kl_weight=kl_weight, temperature=temperature)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


def main(epochs=5):
    torch.manual_seed(0)
    images, labels = (torch.tensor(array) for array in load_digits(return_X_y=True))
    images = (images / 16).float()
    rank = torch.cat([torch.arange((labels[:1500] == c).sum()) for c in range(10)])
    order = labels[:1500].argsort()
    kept = order[rank < (130 * 0.1 ** (labels[order] / 9))]  # ten times fewer of the last class than of the first
    counts = labels[kept].bincount().float()

    def network(width):
        return torch.nn.Sequential(torch.nn.Linear(64, width), torch.nn.ReLU(), torch.nn.Linear(width, 10))

    def train(student, teacher, alpha):
        optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9)
        for epoch in range(epochs):
            for batch in kept[torch.randperm(len(kept))].split(64):
                loss = distillation_step(student, teacher, optimizer, images[batch], labels[batch], counts, alpha)
            accuracy = (student(images[1500:]).argmax(1) == labels[1500:]).float().mean()
            print(f"alpha {alpha}, epoch {epoch}: loss {loss:.3f}, test accuracy {accuracy:.1%}")

    teacher, student = network(512), network(32)
    train(teacher, teacher, alpha=0.0)
    train(student, teacher, alpha=0.5)


if __name__ == "__main__":
    main()
