"""Run by test_triton_glue.py: `python interpreted_glue.py pgd|balanced_softmax_kl`, with TRITON_INTERPRET=1."""

import sys

import torch

from ltat_fast.ops import balanced_softmax_kl_ref, pgd, pgd_step_ref


def check_pgd():
    torch.manual_seed(0)
    layouts = {
        "contiguous": lambda t: t.contiguous(),
        "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
        "permuted": lambda t: t.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
        "sliced": lambda t: torch.repeat_interleave(t, 2, 3)[..., ::2],
        "broadcast": lambda t: t,
    }
    x_adv, grad, x = (torch.rand(2, 3, 5, 7) - shift for shift in (0, 0.5, 0))
    x[1] = x[0]
    expected = pgd_step_ref(x_adv, grad, x, 0.1, 0.2)
    for name, layout in layouts.items():
        centre = x[:1].expand(2, -1, -1, -1) if name == "broadcast" else layout(x)
        for slope in (layout(grad), grad):
            args = (layout(x_adv), slope, centre, 0.1, 0.2, 0.0, 1.0)
            stepped = pgd._pgd_step_cuda(*args)
            assert stepped.stride() == torch.empty_like(args[0]).stride(), name
            torch.testing.assert_close(stepped, expected, rtol=0, atol=0)
            out = layout(torch.zeros_like(x))
            strides = out.stride()
            pgd._pgd_step_out_cuda(*args, out)
            assert out.stride() == strides
            torch.testing.assert_close(out, expected, rtol=0, atol=0)
        start = pgd._pgd_init_cuda(centre, torch.tensor([5]), 0.1, 1e-3, 0.0, 1.0, "uniform")
        assert start.stride() == torch.empty_like(centre).stride()
        assert ((start - x).abs() <= 0.1 + 1e-7).all()
        assert (start != x).float().mean() > 0.9


def check_balanced_softmax_kl():
    module = sys.modules["ltat_fast.ops.balanced_softmax_kl"]
    torch.manual_seed(0)
    logits, teacher = torch.randn(5, 17), torch.randn(5, 17)
    labels, counts = torch.tensor([0, 16, 3, 3, 9]), torch.arange(1.0, 18)
    spread = torch.stack([labels, labels], 1)[:, 0]
    scalars = {"tau": 0.7, "kl_weight": 1.7, "temperature": 2.5}
    for t in (None, teacher, teacher.T.contiguous().T):
        for reduction in ("none", "mean", "sum"):
            for z, n in ((logits, counts), (logits.T.contiguous().T, counts.long())):
                args = (z, spread, n, t, *scalars.values(), reduction)
                loss, stats = module._forward_cuda(*args)
                upstream = torch.rand(10)[::2] if reduction == "none" else torch.tensor(1.3)
                grad = module._backward_cuda(upstream, *args[:4], stats, *args[4:])
                fakes = (*module._loss_and_stats(*args), module._grad_logits(loss, z))
                for real, fake in zip((loss, stats, grad), fakes, strict=True):
                    assert (real.shape, real.stride(), real.dtype) == (fake.shape, fake.stride(), fake.dtype)
                wanted = logits.double().requires_grad_()
                exact = balanced_softmax_kl_ref(wanted, labels, counts, t, reduction=reduction, **scalars)
                torch.testing.assert_close(loss.double(), exact.detach(), rtol=1e-5, atol=1e-6)
                (right,) = torch.autograd.grad(exact, wanted, upstream.double())
                torch.testing.assert_close(grad.double(), right, rtol=1e-5, atol=1e-6)


{"pgd": check_pgd, "balanced_softmax_kl": check_balanced_softmax_kl}[sys.argv[1]]()
