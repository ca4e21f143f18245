"""torchvision can be imported with a CPU-only torch; a torchvision that works by itself is not changed."""

import subprocess
import sys
import textwrap


def run(script):
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_transforms_and_datasets_work():
    out = run("""
        import torch
        from ltat_fast._torchvision import torchvision
        from ltat_fast._torchvision import torchvision as again
        from torchvision.transforms.v2 import functional

        assert again is torchvision
        print(functional.invert(torch.tensor([[[0, 255]]], dtype=torch.uint8)).tolist())
        print(torchvision.datasets.CIFAR10.__name__)
    """)
    assert out.split("\n")[:2] == ["[[[255, 0]]]", "CIFAR10"]


def test_a_torchvision_that_works_is_not_changed():
    """With a substitute that imports without an error, no operator is declared and the substitute is returned."""
    out = run("""
        import sys, types
        import torch

        sys.modules["torchvision"] = stand_in = types.ModuleType("torchvision")
        from ltat_fast._torchvision import torchvision

        assert torchvision is stand_in
        print(hasattr(torch.ops.torchvision, "nms"))
    """)
    assert out.strip() == "False"


def test_another_import_error_is_not_hidden():
    out = run("""
        import importlib.abc, sys

        class Broken(importlib.abc.MetaPathFinder):
            def find_spec(self, name, path, target=None):
                if name == "torchvision":
                    raise RuntimeError("a different fault")

        sys.meta_path.insert(0, Broken())
        try:
            import ltat_fast._torchvision
        except RuntimeError as error:
            print(error)
    """)
    assert out.strip() == "a different fault"
