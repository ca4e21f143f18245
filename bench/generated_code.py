"""What a module written by Inductor for a GPU does: its launches, library calls and memory traffic, read off its text.

Traffic is counted in whole tensors: a kernel reads each input once and writes each output once, and does both to an
``in_out`` argument. Reads that hit the L2 cache are counted too, so this is an upper bound for small tensors.
"""

import ast
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

SMALL_BYTES = 2_000_000  # a launch that moves less takes longer to start than to run
_BITS = re.compile(r"\*[a-z]*(\d+)")  # pointer types of Triton: *bf16, *fp32, *i64, *i1, *fp8e4nv


@dataclass(frozen=True)
class GeneratedCode:
    """Counts of one run of the module.

    launch_bytes: bytes moved by each Triton launch, in order.
    conv_forward: convolutions. conv_backward: calls of convolution_backward. backward_gradients: how many gradients
    those calls compute, one or two kernels each call.
    other_calls: every other operator, such as matrix products and the operators of this package.
    """

    launch_bytes: tuple[int, ...]
    conv_forward: int
    conv_backward: int
    backward_gradients: int
    other_calls: int

    @property
    def small_launches(self) -> int:
        return sum(size < SMALL_BYTES for size in self.launch_bytes)


def read(source: str) -> GeneratedCode:
    """Return the counts of a module.

    source: text of the module, as Inductor writes it for Triton. Raises ValueError for text that this function does not
    understand, because a kernel left out would be a wrong number.
    """
    tree = ast.parse(source)
    kernels = dict(_kernels(tree))
    call = next((node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "call"), None)
    if call is None:
        raise ValueError("this is not a module of Inductor: it has no function named call")
    elements: dict[str, int] = {}
    launch_bytes = []
    conv_forward = conv_backward = backward_gradients = other_calls = 0
    for statement in _statements(call.body):
        value, function = statement.value, ""
        if isinstance(value, ast.Call):
            function = ast.unparse(value.func)
        if isinstance(statement, ast.Assign):
            _note_assignment(elements, ast.unparse(statement.targets[0]), value, function)
        if function == "assert_size_stride":
            elements[ast.unparse(value.args[0])] = math.prod(ast.literal_eval(value.args[1]))
        elif function.endswith(".run"):
            launch_bytes.append(_launch_bytes(kernels, function.removesuffix(".run"), value, elements))
        elif function in ("extern_kernels.convolution", "torch.ops.ltat.conv_relu.default"):
            conv_forward += 1
        elif function == "torch.ops.aten.convolution_backward.default":
            conv_backward += 1
            backward_gradients += sum(ast.literal_eval(value.args[-1])[:2])  # the third is of the bias
        elif function.startswith(("extern_kernels.", "torch.ops.", "aten.")):
            other_calls += 1
    return GeneratedCode(tuple(launch_bytes), conv_forward, conv_backward, backward_gradients, other_calls)


def _kernels(tree: ast.Module) -> Iterator[tuple[str, dict[str, str]]]:
    """(name, type of each parameter) of each Triton kernel."""
    for node in tree.body:
        value = node.value if isinstance(node, ast.Assign) else None
        if isinstance(value, ast.Call) and ast.unparse(value.func) == "async_compile.triton":
            yield ast.unparse(node.targets[0]), _signature(ast.literal_eval(value.args[1]))


def _signature(source: str) -> dict[str, str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and key.value == "signature":
                    return ast.literal_eval(value)
    raise ValueError("a Triton kernel has no signature")


def _statements(body: list[ast.stmt]) -> Iterator[ast.Assign | ast.Expr]:
    """Assignments and calls in order, those within blocks included."""
    for statement in body:
        if isinstance(statement, ast.Assign | ast.Expr):
            yield statement
        elif isinstance(statement, ast.With):
            yield from _statements(statement.body)
        elif not isinstance(statement, ast.Delete | ast.Return):
            raise ValueError(f"unexpected statement in generated code: {ast.unparse(statement).splitlines()[0]}")


def _note_assignment(elements: dict[str, int], name: str, value: ast.expr, function: str) -> None:
    """Note how many elements a new name has, if this assignment says so."""
    if function.startswith("empty_strided_"):
        elements[name] = math.prod(ast.literal_eval(value.args[0]))
    elif function == "reinterpret_tensor":
        elements[name] = math.prod(ast.literal_eval(value.args[1]))
    elif isinstance(value, ast.Name) and value.id in elements:
        elements[name] = elements[value.id]


def _launch_bytes(kernels: dict[str, dict[str, str]], kernel: str, call: ast.Call, elements: dict[str, int]) -> int:
    if kernel not in kernels:
        raise ValueError(f"the module launches {kernel}, which it does not define")
    total = 0
    for (parameter, kind), argument in zip(kernels[kernel].items(), call.args, strict=False):  # constants come last
        if not kind.startswith("*"):
            continue
        if isinstance(argument, ast.Call):
            count = math.prod(ast.literal_eval(argument.args[1]))  # reinterpret_tensor(buffer, size, stride, offset)
        else:
            name = ast.unparse(argument)
            if name not in elements:
                raise ValueError(f"the size of {name}, which {kernel} uses, is not known")
            count = elements[name]
        width = max(8, int(_BITS.match(kind)[1])) // 8
        total += count * width * (2 if parameter.startswith("in_out") else 1)
    return total
