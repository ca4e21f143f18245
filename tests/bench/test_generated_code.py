"""Counts read off a small module that Inductor (torch 2.11) wrote for sm_90, with the kernels' bodies left out."""

import pytest

from bench.generated_code import GeneratedCode, read

MODULE = """
from torch._inductor.async_compile import AsyncCompile
async_compile = AsyncCompile()


triton_poi_fused_convolution_relu_0 = async_compile.triton('triton_poi_fused_convolution_relu_0', '''
@triton_heuristics.pointwise(
    size_hints={'x': 32768},
    triton_meta={'signature': {'in_out_ptr0': '*bf16', 'in_ptr0': '*bf16', 'xnumel': 'i32', 'XBLOCK': 'constexpr'}, 'device': DeviceProperties(type='cuda', cc=90), 'constants': {}},
)
@triton.jit
def triton_poi_fused_convolution_relu_0(in_out_ptr0, in_ptr0, xnumel, XBLOCK : tl.constexpr):
    xnumel = 32768
''', device_str='cuda')


triton_per_fused_add_1 = async_compile.triton('triton_per_fused_add_1', '''
@triton_heuristics.persistent_reduction(
    triton_meta={'signature': {'in_ptr0': '*fp32', 'in_ptr1': '*i64', 'in_ptr2': '*i1', 'out_ptr0': '*fp32', 'xnumel': 'i32', 'XBLOCK': 'constexpr'}, 'device': None, 'constants': {}},
)
@triton.jit
def triton_per_fused_add_1(in_ptr0, in_ptr1, in_ptr2, out_ptr0, xnumel, XBLOCK : tl.constexpr):
    xnumel = 8
''', device_str='cuda')


async_compile.wait(globals())
del async_compile

class Runner:
    def __init__(self, partitions):
        self.partitions = partitions

    def call(self, args):
        arg0_1, arg1_1, arg2_1, arg3_1 = args
        args.clear()
        assert_size_stride(arg0_1, (8, 3, 16, 16), (768, 1, 48, 3))
        assert_size_stride(arg1_1, (16, 3, 3, 3), (27, 1, 9, 3))
        assert_size_stride(arg2_1, (16, ), (1, ))
        assert_size_stride(arg3_1, (8, ), (1, ))
        with torch.cuda._DeviceGuard(0):
            torch.cuda.set_device(0)
            # Topologically Sorted Source Nodes: [conv2d], Original ATen: [aten.convolution]
            buf1 = extern_kernels.convolution(arg0_1, arg1_1, stride=(1, 1), padding=(1, 1), dilation=(1, 1), transposed=False, output_padding=(0, 0), groups=1, bias=None)
            assert_size_stride(buf1, (8, 16, 16, 16), (4096, 1, 256, 16), 'torch.ops.aten.convolution.default')
            buf2 = buf1; del buf1  # reuse
            stream0 = get_raw_stream(0)
            triton_poi_fused_convolution_relu_0.run(buf2, arg2_1, 32768, stream=stream0)
            del arg2_1
            buf3 = torch.ops.aten.convolution_backward.default(buf2, arg0_1, arg1_1, [0], [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, True, False])
            buf4 = buf3[0]
            assert_size_stride(buf4, (8, 3, 16, 16), (768, 1, 48, 3), 'torch.ops.aten.convolution_backward.default')
            assert_alignment(buf4, 16, 'torch.ops.aten.convolution_backward.default')
            buf5 = torch.ops.aten.convolution_backward.default(buf2, arg0_1, arg1_1, [0], [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, False, False])
            buf6 = empty_strided_cuda((8, 10), (10, 1), torch.float32)
            extern_kernels.mm(reinterpret_tensor(buf2, (8, 4096), (4096, 1), 0), arg1_1, out=buf6)
            buf7 = empty_strided_cuda((), (), torch.float32)
            buf8 = reinterpret_tensor(buf6, (80, ), (1, ), 0); del buf6  # reuse
            triton_per_fused_add_1.run(reinterpret_tensor(buf8, (5, 10), (10, 1), 0), arg3_1, buf8, buf7, 8, stream=stream0)
            buf9 = torch.ops.ltat.pgd_step.default(arg0_1, buf4, arg0_1, 0.1, 0.1, 0.0, 1.0)
        return (buf9, )
"""  # noqa: E501

RELU = 2 * 8 * 16 * 16 * 16 * 2 + 16 * 2  # bfloat16 in place, which is read and written, and a bias
REDUCTION = 50 * 4 + 8 * 8 + 80 * 1 + 4  # a view of 50 elements, labels, booleans, one number


def test_counts_of_a_recorded_module():
    assert read(MODULE) == GeneratedCode(
        launch_bytes=(RELU, REDUCTION),
        conv_forward=1,
        conv_backward=2,
        backward_gradients=3,
        other_calls=2,  # mm, pgd_step
    )


def test_a_launch_is_small_below_two_megabytes():
    code = read(MODULE.replace("(8, 16, 16, 16)", "(512, 16, 16, 16)"))
    assert (code.small_launches, len(code.launch_bytes)) == (1, 2)


@pytest.mark.parametrize(
    ("part", "replacement", "message"),
    [
        ("def call", "def other", "no function named call"),
        ("buf7 = empty_strided_cuda((), (), torch.float32)", "", "the size of buf7"),
        ("triton_per_fused_add_1 =", "triton_renamed =", "which it does not define"),
        ("torch.cuda.set_device(0)", "if True: pass", "unexpected statement"),
        ("'signature'", "'other'", "no signature"),
    ],
)
def test_what_it_does_not_understand_is_an_error(part, replacement, message):
    assert part in MODULE
    with pytest.raises(ValueError, match=message):
        read(MODULE.replace(part, replacement))
