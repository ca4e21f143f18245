"""How operators find their kernels: schemas, direct calls, instruction sets, running without the extension."""

import importlib
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import ltat_fast
from helpers.op_cases import assert_same, normal
from ltat_fast import _ext, ops
from ltat_fast.ops import backend_info, balanced_softmax_kl, pgd, pgd_step
from ltat_fast.ops._operator import OPERATORS, is_plain_call

NEEDS_EXT = pytest.mark.skipif(not _ext.HAS_EXT, reason=f"no C++ extension: {_ext.WHY_NOT}")
NAMES = [operator.dispatched._schema.name for operator in OPERATORS]
HERE = Path(__file__).parent
OP_FILES = [path.stem for path in Path(ops.__file__).parent.glob("[a-z]*.py")]
OP_TESTS = sorted(f"test_{name}" for name in OP_FILES if (HERE / f"test_{name}.py").exists())  # each has samples()


def run_python(code, *args, **environment):
    environment = {**os.environ, **environment}
    command = [sys.executable, "-W", "error::UserWarning", "-c", textwrap.dedent(code), *map(str, args)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)


@pytest.mark.parametrize("operator", OPERATORS, ids=NAMES)
def test_the_dispatcher_has_the_schema_of_the_operator(operator):
    assert torch._C.parse_schema(operator.schema) == operator.dispatched._schema


@NEEDS_EXT
@pytest.mark.parametrize("operator", OPERATORS, ids=NAMES)
def test_the_extension_implements_the_operator(operator):
    name = operator.dispatched._schema.name
    assert "cpu" in operator.kernels
    assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU")
    assert operator.autograd is None or torch._C._dispatch_has_kernel_for_dispatch_key(name, "Autograd")


@NEEDS_EXT
def test_every_function_of_the_extension_belongs_to_an_operator():
    expected = {f"{name.removeprefix('ltat::')}_{kind}" for name in NAMES for kind in ("cpu", "cuda", "autograd")}
    assert {name for name in dir(_ext.C) if not name.startswith("_")} <= expected | {"build_info"}


@NEEDS_EXT
def test_a_schema_that_does_not_fit_the_cpp_function_is_refused():
    """torch checks this when Python defines the schema. So the schema is written only in Python."""
    code = """
    import torch
    from ltat_fast import _ext

    try:
        torch.library.Library("ltat", "FRAGMENT").define("igdm(Tensor student_plus) -> Tensor")
    except RuntimeError as error:
        assert "igdm" in str(error), error
    else:
        raise AssertionError("a wrong schema was accepted")
    """
    ran = run_python(code)
    assert ran.returncode == 0, ran.stderr


def test_backend_info_lists_every_public_op():
    public = {name for name in ops.__all__ if not name.endswith("_ref") and name != "backend_info"}
    assert set(backend_info()) == public


def test_every_op_has_samples():
    assert {key.split(":")[0] for key in samples_here()} == set(backend_info())


@NEEDS_EXT
def test_direct_call_and_dispatcher_agree():
    logits, labels, counts, teacher = normal(41, 100), torch.arange(41), torch.arange(1.0, 101), normal(41, 100, seed=1)
    results = []
    for dispatched in (False, True):
        z = logits.clone().requires_grad_()
        if dispatched:  # every op must go through an active mode
            with FlopCounterMode(display=False):
                loss = balanced_softmax_kl(z, labels, counts, teacher)
                grad = torch.autograd.grad(loss, z)[0]
        else:
            loss = balanced_softmax_kl(z, labels, counts, teacher)
            grad = torch.autograd.grad(loss, z)[0]
        results.append((loss.detach(), grad))
    for a, b in zip(*results, strict=True):
        assert_same(a, b)


def test_only_eager_calls_on_ordinary_tensors_are_plain():
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


SAVE_SAMPLES = f"""
    import importlib, sys, torch
    sys.path[:0] = [{str(HERE)!r}, {str(HERE.parent)!r}]  # the tests, and their helpers
    samples = {{}}
    for test in {OP_TESTS}:
        samples |= importlib.import_module(test).samples()
    torch.save(samples, sys.argv[1])
"""


def samples_here():
    return {key: value for test in OP_TESTS for key, value in importlib.import_module(test).samples().items()}


@NEEDS_EXT
@pytest.mark.skipif("avx2" not in _ext.C.build_info()["cpu_builds"] if _ext.HAS_EXT else True, reason="one build only")
@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_every_instruction_set_gives_the_same_results(capability, tmp_path):
    """Compare each build of the kernels that this CPU can run with the build of this process."""
    saved = tmp_path / "samples.pt"
    code = (
        SAVE_SAMPLES
        + """
    from ltat_fast import _ext
    print(_ext.C.build_info()["cpu_isa"])
    """
    )
    ran = run_python(code, saved, ATEN_CPU_CAPABILITY=capability)
    assert ran.returncode == 0, ran.stderr
    if ran.stdout.strip() != {"default": "baseline"}.get(capability, capability):
        pytest.skip(f"this CPU has no {capability}: it ran {ran.stdout.strip()}")
    torch.testing.assert_close(torch.load(saved), samples_here(), rtol=1e-5, atol=1e-6)


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
    saved = tmp_path / "samples.pt"
    code = (
        hidden
        + SAVE_SAMPLES
        + """
    from ltat_fast import _ext
    from ltat_fast.ops import backend_info, balanced_softmax_kl, igdm_loss, pgd_init, pgd_step

    assert not _ext.HAS_EXT
    assert "_C" in _ext.WHY_NOT and "pip install" in _ext.WHY_NOT, _ext.WHY_NOT
    assert all(info["cpu"] == f"torch ({_ext.WHY_NOT})" for info in backend_info().values())

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(x, logits, labels, teacher):
        x_adv = pgd_step(pgd_init(x, 0.1), x, x, 0.1, 0.2, out=torch.empty_like(x))
        loss = balanced_softmax_kl(logits, labels, [1.0] * 4, teacher)
        return loss + igdm_loss(logits, logits, teacher, teacher), x_adv

    loss, x_adv = compiled(torch.rand(2, 3), torch.randn(3, 4), torch.tensor([0, 3, 1]), torch.randn(3, 4))
    assert loss.isfinite() and ((x_adv >= 0) & (x_adv <= 1)).all()
    for label in (-1, 4):
        try:
            balanced_softmax_kl(torch.randn(1, 4), torch.tensor([label]), [1.0] * 4)
        except ValueError as error:
            assert f"label {label}" in str(error)
        else:
            raise AssertionError(f"label {label} raised no error")
    """
    )
    ran = run_python(code, saved)
    assert ran.returncode == 0, ran.stderr
    plain, fused = (
        {key: value for key, value in samples.items() if "random" not in key}  # plain torch draws other noise
        for samples in (torch.load(saved), samples_here())
    )
    torch.testing.assert_close(plain, fused, rtol=1e-5, atol=1e-6)


def test_schemas_are_defined_without_the_extension():
    code = (
        HIDE_EXTENSION
        + """
    from ltat_fast import ops
    from ltat_fast.ops._operator import OPERATORS

    for operator in OPERATORS:
        print(operator.dispatched._schema)
    """
    )
    ran = run_python(code)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines() == [str(torch._C.parse_schema(operator.schema)) for operator in OPERATORS]


def test_an_extension_older_than_an_op_leaves_that_op_to_plain_torch():
    code = """
    import torch
    from ltat_fast import _ext

    class Older:  # the extension before igdm_loss was written
        def __getattr__(self, name):
            if name.startswith("igdm"):
                raise AttributeError(name)
            return getattr(extension, name)

    extension, _ext.C = _ext.C, Older()
    from ltat_fast.ops import backend_info, igdm_loss, igdm_loss_ref

    logits = [torch.randn(3, 4) for _ in range(4)]
    assert torch.equal(igdm_loss(*logits), igdm_loss_ref(*logits))
    print(backend_info()["igdm_loss"]["cpu"])
    print(backend_info()["pgd_step"]["cpu"])
    """
    ran = run_python(code)
    assert ran.returncode == 0, ran.stderr
    igdm, pgd_step = ran.stdout.splitlines()
    assert igdm.startswith("torch (")
    assert _ext.INSTALL in igdm
    assert pgd_step == ("c++" if _ext.HAS_EXT else f"torch ({_ext.WHY_NOT})")


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
    """Without this the other GPU tests could compare the reference with itself."""
    assert backend_info()[op]["cuda"] in ("triton", "c++/cuda")
