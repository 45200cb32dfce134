"""Kernels, compiled for a device that need not be there; Triton's interpreter accepts what its compiler does not."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

PROGRAM = """
import warnings
warnings.simplefilter("ignore")
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from hf_r2.tiles import Tiles, kernels, tiles

POINTERS = {torch.float32: "*fp32", torch.float64: "*fp64", torch.int32: "*i32", torch.int64: "*i64"}
compiled = set()

class Compiled:
    def __init__(self, kernel):
        self.kernel = kernel
    def __getitem__(self, grid):
        return self
    def __call__(self, *arguments, num_warps=4, **flags):
        values = dict(zip(self.kernel.arg_names, arguments)) | flags
        constants = {p.name: values[p.name] for p in self.kernel.params if p.is_constexpr}
        types = {name: POINTERS[v.dtype] if isinstance(v, torch.Tensor) else "i32" for name, v in values.items()}
        signature = {name: "constexpr" if name in constants else types[name] for name in self.kernel.arg_names}
        source = ASTSource(self.kernel, signature=signature, constexprs=constants)
        triton.compile(source, target=GPUTarget("cuda", 80, 32), options={"num_warps": num_warps})
        compiled.add(self.kernel.__name__)

class Kernels:
    def __getattr__(self, name):
        return Compiled(getattr(kernels, name))

tiles._kernels = Kernels
for dtype in (torch.float32, torch.bfloat16):
    blocks = [torch.ones(1, 9000, dtype=dtype), torch.ones(3, 64, dtype=dtype)]
    each, tiled = torch.ones(4), Tiles(blocks)
    of_tiles = tiled.largest()[2]
    tiled.add_largest(blocks, of_tiles, each, each)
    tiled.ends_and_squares()
    tiled.add_signs_outside(blocks, tiled.excess(each)[1], each, each)
    tiled.level_of(each.double())
    tiled.add_signs_from(blocks, each, each, each)
    tiled.soft_sums(each, torch.ones(4, 2))
    tiled.add_soft_gradient(blocks, each, torch.ones(4, 2), torch.ones(4, 4))
    tiled.moments(each, each)
    tiled.add_kurtosis_gradient(blocks, torch.ones(4, 5))
    tiled.clamp(each, each)
    tiled.clamp(each, tops=tiled.level_above(each.double())[1])
print(*sorted(compiled))
"""


@pytest.mark.slow
def test_every_kernel_compiles():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    from hf_r2.tiles import kernels

    public = [name for name, value in vars(kernels).items() if hasattr(value, "__wrapped__") or hasattr(value, "fn")]
    assert done.stdout.split() == sorted(name for name in public if not name.startswith("_"))
