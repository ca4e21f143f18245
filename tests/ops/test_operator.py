"""How ops find their kernels: schemas, shortcuts, builds for several instruction sets, life without the extension."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import ltat_fast
from helpers.op_cases import assert_same, normal
from ltat_fast import _ext
from ltat_fast.ops import backend_info, balanced_softmax_kl, igdm, pgd, pgd_step
from ltat_fast.ops._operator import Operator, is_plain_call

NEEDS_EXT = pytest.mark.skipif(not _ext.HAS_EXT, reason=f"no C++ extension: {_ext.WHY_NOT}")
MODULES = [pgd, sys.modules["ltat_fast.ops.balanced_softmax_kl"], igdm]
OPERATORS = {f"{m.__name__}.{name}": op for m in MODULES for name, op in vars(m).items() if isinstance(op, Operator)}
ONE_OF_EACH = """
    import torch
    from ltat_fast.ops import balanced_softmax_kl, igdm_loss, pgd_init, pgd_step

    def one_of_each():
        torch.manual_seed(0)
        x, grad = torch.rand(2, 3, 9, 7), torch.randn(2, 3, 9, 7)
        student = torch.randn(4, 41, 100).requires_grad_()
        counts = torch.arange(100.0)
        step = pgd_step(x, grad, x, 0.02, 0.03, out=torch.empty_like(x))
        bsl = balanced_softmax_kl(student[0], torch.arange(1, 42), counts, student[1], temperature=2.0)
        losses = [bsl] + [igdm_loss(*student, divergence=name) for name in ("kl", "l1", "l2")]
        (grad,) = torch.autograd.grad(sum(losses), student)
        starts = [pgd_init(x, 0.1, noise, torch.Generator().manual_seed(1)) for noise in ("uniform", "gaussian")]
        assert all(((start - x).abs() <= 0.1 + 1e-7).all() for start in starts)
        return [step, grad, *losses, *starts]
"""


def run_python(code, *args, **environment):
    environment = {**os.environ, **environment}
    command = [sys.executable, "-W", "error::UserWarning", "-c", textwrap.dedent(code), *map(str, args)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


@NEEDS_EXT
@pytest.mark.parametrize("name", OPERATORS)
def test_python_and_cpp_define_the_same_schema(name):
    operator = OPERATORS[name]
    assert torch._C.parse_schema(operator.schema) == operator.dispatched._schema


@NEEDS_EXT
def test_every_op_is_covered():
    assert len(OPERATORS) == 7
    assert set(backend_info()) == {"pgd_init", "pgd_step", "balanced_softmax_kl", "igdm_loss"}


@NEEDS_EXT
def test_shortcut_and_dispatcher_agree():
    logits, labels, counts, teacher = normal(41, 100), torch.arange(41), torch.arange(1.0, 101), normal(41, 100, seed=1)
    results = []
    for dispatched in (False, True):
        z = logits.clone().requires_grad_()
        if dispatched:  # an active mode must be seen by every op
            with FlopCounterMode(display=False):
                loss = balanced_softmax_kl(z, labels, counts, teacher)
                grad = torch.autograd.grad(loss, z)[0]
        else:
            loss = balanced_softmax_kl(z, labels, counts, teacher)
            grad = torch.autograd.grad(loss, z)[0]
        results.append((loss.detach(), grad))
    for a, b in zip(*results, strict=True):
        assert_same(a, b)


def test_what_is_a_plain_call():
    x = torch.rand(3)
    assert is_plain_call(x, torch.nn.Parameter(x), None, 1.0, "mean")
    assert not is_plain_call(x.as_subclass(type("Marked", (torch.Tensor,), {})))
    with torch._subclasses.FakeTensorMode():
        assert not is_plain_call(torch.rand(3))
    assert not torch.func.grad(lambda z: z.sum() * pgd._pgd_step.runs_on(z))(x).any()


@NEEDS_EXT
def test_tracing_sees_the_ops():
    x = torch.rand(2, 3)
    traced = torch.fx.experimental.proxy_tensor.make_fx(lambda x: pgd_step(x, x, x, 0.1, 0.2))(x)
    assert "torch.ops.ltat.pgd_step" in traced.code
    exported = torch.export.export(PgdStep(), (x,))
    assert "torch.ops.ltat.pgd_step" in exported.graph_module.code
    assert_same(exported.module()(x), pgd_step(x, x, x, 0.1, 0.2))


class PgdStep(torch.nn.Module):
    def forward(self, x):
        return pgd_step(x, x, x, 0.1, 0.2)


@NEEDS_EXT
def test_other_devices_run_plain_torch():
    x = torch.rand(4, 10, device="meta")
    assert pgd_step(x, x, x, 0.1, 0.2).shape == x.shape
    assert balanced_softmax_kl(x, torch.zeros(4, dtype=torch.int64, device="meta"), [1] * 10).shape == ()


@NEEDS_EXT
@pytest.mark.skipif("avx2" not in _ext.C.build_info()["cpu_builds"] if _ext.HAS_EXT else True, reason="one build only")
@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_every_instruction_set_gives_the_same(capability, tmp_path):
    """Each build of the kernels that this CPU can run, against plain torch in this process."""
    saved = tmp_path / "results.pt"
    code = (
        ONE_OF_EACH
        + """
    import sys
    from ltat_fast import _ext
    torch.save(one_of_each(), sys.argv[1])
    print(_ext.C.build_info()["cpu_isa"])
    """
    )
    ran = run_python(code, saved, ATEN_CPU_CAPABILITY=capability)
    assert ran.returncode == 0, ran.stderr
    if ran.stdout.strip() != {"default": "baseline"}.get(capability, capability):
        pytest.skip(f"this CPU has no {capability}: it ran {ran.stdout.strip()}")
    namespace = {}
    exec(textwrap.dedent(ONE_OF_EACH), namespace)
    for actual, expected in zip(torch.load(saved), namespace["one_of_each"](), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


HIDE_EXTENSION = """
    import sys
    sys.modules["ltat_fast._C"] = None  # importing it now fails
"""
HIDE_TRITON = """
    import sys
    sys.modules["triton"] = None
"""


@pytest.mark.parametrize("hidden", [HIDE_EXTENSION, HIDE_EXTENSION + HIDE_TRITON], ids=["_C", "_C and Triton"])
def test_without_the_extension_or_triton(hidden, tmp_path):
    saved = tmp_path / "results.pt"
    code = (
        hidden
        + ONE_OF_EACH
        + """
    from ltat_fast import _ext
    from ltat_fast.ops import backend_info

    if "ltat_fast._C" in sys.modules and sys.modules["ltat_fast._C"] is None:
        assert not _ext.HAS_EXT
        assert "_C" in _ext.WHY_NOT and "pip install" in _ext.WHY_NOT, _ext.WHY_NOT
        assert all(info["cpu"] == f"torch ({_ext.WHY_NOT})" for info in backend_info().values())
    eager = one_of_each()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(x, logits, labels, teacher):
        x_adv = pgd_step(pgd_init(x, 0.1), x, x, 0.1, 0.2, out=torch.empty_like(x))
        return balanced_softmax_kl(logits, labels, [1.0] * 4, teacher) + igdm_loss(*[logits] * 2, *[teacher] * 2), x_adv

    loss, x_adv = compiled(torch.rand(2, 3), torch.randn(3, 4), torch.tensor([0, 3, 1]), torch.randn(3, 4))
    assert loss.isfinite() and ((x_adv >= 0) & (x_adv <= 1)).all()
    for label in (-1, 4):
        try:
            balanced_softmax_kl(torch.randn(1, 4), torch.tensor([label]), [1.0] * 4)
        except ValueError as error:
            assert f"label {label}" in str(error)
        else:
            raise AssertionError("a wrong label went unnoticed")
    torch.save(eager[:-2], sys.argv[1])  # plain torch draws other noise
    """
    )
    ran = run_python(code, saved)
    assert ran.returncode == 0, ran.stderr
    namespace = {}
    exec(textwrap.dedent(ONE_OF_EACH), namespace)
    for actual, expected in zip(torch.load(saved), namespace["one_of_each"](), strict=False):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_schemas_are_defined_without_the_extension():
    code = (
        HIDE_EXTENSION
        + """
    from ltat_fast.ops import igdm, pgd
    for operator in (igdm._forward, igdm._backward, pgd._pgd_init, pgd._pgd_step, pgd._pgd_step_out):
        print(operator.dispatched._schema)
    """
    )
    ran = run_python(code)
    assert ran.returncode == 0, ran.stderr
    operators = (igdm._forward, igdm._backward, pgd._pgd_init, pgd._pgd_step, pgd._pgd_step_out)
    assert ran.stdout.splitlines() == [str(torch._C.parse_schema(operator.schema)) for operator in operators]


def test_importing_the_package_is_light():
    ran = run_python("import sys, ltat_fast; assert 'torch' not in sys.modules; import ltat_fast.ops")
    assert ran.returncode == 0, ran.stderr
    ran = run_python(
        "import sys, ltat_fast.ops; bad = {'triton', 'torchvision', 'ltat_fast.kernels', 'ltat_fast.methods'};"
        "assert not bad & sys.modules.keys(), bad & sys.modules.keys()"
    )
    assert ran.returncode == 0, ran.stderr
    assert ltat_fast.__version__


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: this GPU test did not run")
@pytest.mark.parametrize("op", backend_info())
def test_a_gpu_runs_the_fused_kernel(op):
    """Or the other GPU tests compare the reference with itself."""
    assert backend_info()[op]["cuda"] in ("triton", "c++/cuda")
