"""The operator against a loop in float64: in torch, in Triton's interpreter, and on a CUDA device.

Run as a module it is the part under the interpreter, in which a process is from the start.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dynmerge.engines.vllm import kernels
from dynmerge.engines.vllm.kernels import by_triton, gather_core_expand

pytestmark = [
    pytest.mark.vllm,
    # Triton 3.9 announces another default of its own.
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION"),
]
has_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
has_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")

SLOTS = 5
ROOT = Path(__file__).parents[3]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}  # of the largest

Indices = Callable[[int], Tensor]
INDICES: dict[str, Indices] = {
    "one": lambda tokens: torch.full((tokens,), 2),
    "base": lambda tokens: torch.full((tokens,), SLOTS),
    "each": lambda tokens: torch.arange(tokens) % (SLOTS + 1),
    "runs": lambda tokens: torch.arange(tokens) // 7 % (SLOTS + 1),
    "one or base": lambda tokens: torch.where(torch.arange(tokens) % 3 == 0, SLOTS, 4),
    "padded": lambda tokens: torch.where(torch.arange(tokens) < tokens - 3, 1, SLOTS),
}


@dataclass(frozen=True)
class Case:
    """One call: sizes, which token is under which slot, and dtypes."""

    tokens: int
    indices: str
    shape: tuple[int, int, int] = (24, 40, 88)  # q, p, d
    dtype: torch.dtype = torch.float32
    y_dtype: torch.dtype | None = None
    index_dtype: torch.dtype = torch.int64

    def arguments(self, device: str = "cpu") -> tuple[Tensor, ...]:
        """y and z as views with a row stride, table, index and U."""
        q, p, d = self.shape
        generator = torch.Generator().manual_seed(self.tokens)

        def normal(*shape: int) -> Tensor:
            made = torch.randn(shape, generator=generator)
            return made.to(device, self.dtype)

        y = normal(self.tokens, d + 20).to(self.y_dtype or self.dtype)[:, 3:]
        z = normal(self.tokens, q + 5)[:, 5:]
        table = normal(SLOTS + 1, q * p + COLUMN + 2)
        table[SLOTS] = 0
        index = INDICES[self.indices](self.tokens).to(device, self.index_dtype)
        return y, z, table, index, normal(d, p)


COLUMN, OFFSET = 11, 6
MIXED = ("runs", "each", "one or base")
CASES = [
    *(Case(tokens, name) for tokens in (0, 1, 5, 17) for name in INDICES),
    *(Case(64, name) for name in MIXED),
    *(Case(17, name, (1, 1, 1)) for name in MIXED),
    *(Case(17, name, (70, 130, 200)) for name in MIXED),
    *(Case(17, name, dtype=torch.float16) for name in MIXED),
    *(Case(17, name, dtype=torch.float16, y_dtype=torch.float32) for name in MIXED),
    *(Case(17, name, y_dtype=torch.bfloat16) for name in MIXED),
    *(Case(17, name, index_dtype=torch.int32) for name in MIXED),
    Case(kernels.FEW_TOKENS + 2, "runs", (24, 40, 8)),
]
# Triton's interpreter multiplies the bits of a bfloat16 as if they were integers.
BFLOAT16 = [replace(case, dtype=torch.bfloat16) for case in CASES if case.dtype == torch.float32]


def written_out(
    y: Tensor, z: Tensor, table: Tensor, column: int, index: Tensor, U: Tensor, offset: int
) -> Tensor:
    """What y becomes, token by token in float64."""
    y, q, (d, p) = y.double(), z.shape[1], U.shape
    for token, slot in enumerate(index.tolist()):
        core = table[slot, column : column + q * p].double().view(q, p)
        y[token, offset : offset + d] += U.double() @ (core.T @ z[token].double())
    return y


def check(case: Case, run: Callable[..., None], device: str = "cpu") -> None:
    """Run a case and hold what it wrote, and what it left alone, to the loop's result."""
    y, z, table, index, U = case.arguments(device)
    before = y.clone()
    wanted = written_out(y, z, table, COLUMN, index, U, OFFSET)
    run(y, z, table, COLUMN, index, U, OFFSET)
    coarsest = max(TOLERANCE[case.dtype], TOLERANCE[case.y_dtype or case.dtype])
    size = wanted.abs().max().item() if case.tokens else 1.0
    torch.testing.assert_close(
        y.double(), wanted, rtol=0, atol=coarsest * size, msg=lambda said: f"{case}: {said}"
    )
    d = U.shape[0]
    assert torch.equal(y[:, :OFFSET], before[:, :OFFSET])
    assert torch.equal(y[:, OFFSET + d :], before[:, OFFSET + d :])
    assert torch.equal(y[index == SLOTS], before[index == SLOTS])


@pytest.mark.parametrize("case", CASES + BFLOAT16, ids=str)
def test_every_token_gets_the_update_of_its_own_core(case: Case) -> None:
    check(case, gather_core_expand)


@has_triton
def test_the_programs_do_the_same_in_tritons_interpreter() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", __name__],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == [str(len(CASES)), "cases"]


@has_triton
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("program", [kernels._core, kernels._expand])
def test_the_programs_compile_without_a_device(
    program: Callable[..., None], dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton import compile as compiled
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = kernels._jit(program)
    sizes = {"BT": 16, "BQ": 64, "BP": 64, "BD": 64}
    pointers = dict.fromkeys(("y", "h", "z", "table", "U"), f"*{dtype}") | {"index": "*i64"}
    signature = {
        name: "constexpr" if name in sizes else pointers.get(name, "i32")
        for name in kernel.arg_names
    }
    used = {name: size for name, size in sizes.items() if name in signature}
    binary = compiled(
        ASTSource(kernel, signature, constexprs=used), target=GPUTarget("cuda", 90, 32)
    )
    assert binary.asm["cubin"]


@pytest.mark.gpu
@has_cuda
@pytest.mark.parametrize("case", CASES + BFLOAT16, ids=str)
def test_every_token_gets_the_update_of_its_own_core_on_a_device(case: Case) -> None:
    check(case, gather_core_expand, "cuda")


@pytest.mark.gpu
@has_cuda
def test_a_captured_graph_follows_tables_and_indices_written_later() -> None:
    y, z, table, index, U = Case(64, "each", dtype=torch.bfloat16).arguments("cuda")
    before = y.clone()
    for _ in range(2):  # compiled before it is captured
        gather_core_expand(y, z, table, COLUMN, index, U, OFFSET)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gather_core_expand(y, z, table, COLUMN, index, U, OFFSET)
    y.copy_(before)
    table[:SLOTS].copy_(torch.randn_like(table[:SLOTS]))
    index.copy_(INDICES["runs"](64))
    wanted = written_out(before, z, table, COLUMN, index, U, OFFSET)
    graph.replay()
    size = wanted.abs().max().item()
    torch.testing.assert_close(y.double(), wanted, rtol=0, atol=TOLERANCE[U.dtype] * size)


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_layer_has_it_as_one_leaf_and_reads_its_buffers_anew(backend: str) -> None:
    y, z, table, index, U = Case(17, "each").arguments()

    def layer(z: Tensor) -> Tensor:
        output = z @ weight
        gather_core_expand(output, z, table, COLUMN, index, U, OFFSET)
        return output.relu()

    weight = torch.randn(z.shape[1], y.shape[1], generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(z), layer(z))
    index.fill_(SLOTS)
    torch.testing.assert_close(compiled(z), (z @ weight).relu())
    index.fill_(1)
    torch.testing.assert_close(compiled(z), layer(z))


@pytest.mark.parametrize("tokens", [1, 17])
def test_the_operator_does_to_its_arguments_what_its_schema_says(tokens: int) -> None:
    y, z, table, index, U = Case(tokens, "each").arguments()
    operator = torch.ops.dynmerge.gather_core_expand.default
    torch.library.opcheck(operator, (y, z, table, COLUMN, index, U, OFFSET))


if __name__ == "__main__":
    for each in CASES:
        check(each, by_triton)
    print(len(CASES), "cases")
