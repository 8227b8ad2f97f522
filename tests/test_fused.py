"""The Triton kernels of decoupled cross-attention against float64, on a GPU or, without one, in
Triton's interpreter.
"""

import logging
import os
import random
import subprocess
import sys
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from imprompt.errors import MismatchError
from tests.interpreted import DEVICE, Counted, autotune, fused

Packed, fused_attention, packed, usable = (
    fused.Packed,
    fused.fused_attention,
    fused.pack_images,
    fused.usable,
)
pytestmark = [
    pytest.mark.usefixtures("interpreted"),
    # NumPy says so, a GPU does not
    pytest.mark.filterwarnings("ignore:divide by zero encountered in log2"),
]
MOST = {torch.float16: 2e-3, torch.bfloat16: 1e-2}  # of the norm of what is right


class Case(NamedTuple):
    query: Tensor
    key: Tensor
    value: Tensor
    images: list[tuple[Tensor, Tensor]]
    weights: Tensor

    def leaves(self) -> list[Tensor]:
        return [self.query, *(x for pair in self.images for x in pair)]


def draw(
    dtype: torch.dtype,
    width: int,
    tokens: tuple[int, ...],
    *,
    batch: int = 2,
    heads: int = 1,
    queries: int = 19,
    texts: int = 21,
    one: bool = False,
    gap: int = 0,
    louder: float = 1.0,
) -> Case:
    """Random tensors as linear layers give them, (B, L, H·d) seen as (B, H, L, d), with `gap`
    numbers between rows.

    `one` prompt for all items; logits `louder` times as large as usual.
    """

    def rows(items: int, length: int) -> Tensor:
        x = torch.randn(items, length, heads * width + gap, device=DEVICE).to(dtype)
        return x[..., : heads * width].unflatten(-1, (heads, width)).transpose(1, 2)

    images = [(rows(1 if one else batch, n), rows(1 if one else batch, n)) for n in tokens]
    weights = torch.rand(len(tokens), 1, 1, 1, 1, device=DEVICE)
    return Case(
        rows(batch, queries) * louder, rows(batch, texts), rows(batch, texts), images, weights
    )


def reference(query: Tensor, key: Tensor, value: Tensor, images: Packed, weights: Tensor) -> Tensor:
    out = F.scaled_dot_product_attention(query, key, value)
    split = [x.split(images.tokens, 2) for x in (images.key, images.value)]
    for image_key, image_value, weight in zip(*split, weights, strict=True):
        out = torch.addcmul(
            out, weight.to(out.dtype), F.scaled_dot_product_attention(query, image_key, image_value)
        )
    return out


def run(case: Case, attend: Any, gradient: Tensor | None = None) -> list[Tensor]:
    """The output, and with `gradient` its dQ, dK' and dV'."""
    leaves = [x.detach().requires_grad_(gradient is not None) for x in case.leaves()]
    images = packed(list(zip(leaves[1::2], leaves[2::2], strict=True)))
    out = attend(leaves[0], case.key, case.value, images, case.weights)
    if gradient is None:
        return [out]
    by_query, *by_image = torch.autograd.grad(out, leaves, gradient)
    return [
        out.detach(),
        by_query,
        *(torch.cat([x.flatten() for x in by_image[kind::2]]) for kind in range(2)),
    ]


def double(case: Case) -> Case:
    images = [(key.double(), value.double()) for key, value in case.images]
    return Case(
        case.query.double(), case.key.double(), case.value.double(), images, case.weights.double()
    )


def check(case: Case, told: object = "", backward: bool = True) -> None:
    """Near what float64 makes of the same inputs: within MOST of its norm, and nowhere further off
    than 4 MOST of its largest.
    """
    gradient = (
        torch.randn(case.query.shape, device=DEVICE).to(case.query.dtype) if backward else None
    )
    found = run(case, fused_attention, gradient)
    right = run(double(case), reference, gradient.double() if gradient is not None else None)
    most = MOST[case.query.dtype]
    for name, x, r in zip(("Z", "dQ", "dK'", "dV'"), found, right, strict=False):
        off, furthest = (
            (x.double() - r).norm() / r.norm(),
            (x.double() - r).abs().max() / r.abs().max(),
        )
        assert off <= most, f"{name} is {off:.2e} off (largest {furthest:.2e}); {told}"
        assert furthest <= 4 * most, f"{name} is {off:.2e} off (largest {furthest:.2e}); {told}"


@pytest.mark.parametrize("dtype", MOST, ids=str)
@pytest.mark.parametrize("width", [40, 48, 64, 80, 128, 160])
def test_any_shapes(width: int, dtype: torch.dtype) -> None:
    """Shapes, strides, weights and prompts are drawn anew at every run."""
    seed = random.SystemRandom().randrange(2**32)
    choice = random.Random(seed)
    torch.manual_seed(seed)
    tokens = tuple(
        choice.choice([1, 4, 16, choice.randrange(2, 70)]) for _ in range(choice.randrange(1, 3))
    )
    batch, heads = choice.choice([(1, 1), (1, 2), (2, 1), (2, 2)])
    case = draw(
        dtype,
        width,
        (*tokens, 5),
        batch=batch,
        heads=heads,
        queries=choice.randrange(2, 80),
        texts=choice.choice([2, 77, choice.randrange(2, 200)]),
        one=choice.random() < 0.3,
        gap=choice.choice([0, 3, 16]),
        louder=choice.choice([1.0, 3.0]),
    )
    items, _, queries, _ = case.query.shape
    shape = (len(case.images), choice.choice([1, items]), 1, choice.choice([1, queries]), 1)
    weights = (torch.rand(shape, device=DEVICE) * 1.5 - 0.2) * (
        torch.rand(shape, device=DEVICE) < 0.8
    )
    weights[-1] += 0.3
    check(case._replace(weights=weights.to(choice.choice([dtype, torch.float32]))), f"seed {seed}")


@pytest.mark.parametrize("dtype", MOST, ids=str)
def test_large_logits_do_not_overflow(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    check(draw(dtype, 64, (4,), texts=77, louder=20.0))


def test_one_key_and_one_query() -> None:
    torch.manual_seed(1)
    check(draw(torch.float16, 40, (1,), queries=1, texts=1), backward=False)


def test_sixteen_prompts_applied_in_different_places() -> None:
    torch.manual_seed(2)
    case = draw(torch.float16, 40, tuple(range(1, 17)), queries=70, batch=1)
    weights = torch.zeros(16, 1, 1, 70, 1, device=DEVICE)
    for number in range(16):
        weights[number, ..., 4 * number : 4 * number + 7, :] = 0.8
    check(case._replace(weights=weights))


def test_many_image_tokens_and_splits_of_the_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "SPLIT", 32)
    torch.manual_seed(3)
    case = draw(torch.float16, 40, (20, 50), queries=70, batch=1)
    check(case)
    gradient = torch.randn_like(case.query)
    assert all(
        torch.equal(a, b)
        for a, b in zip(*(run(case, fused_attention, gradient) for _ in range(2)), strict=True)
    )


def test_scale_zero_is_the_text_alone() -> None:
    torch.manual_seed(4)
    case = draw(torch.float16, 40, (4,))
    unconditioned = case._replace(weights=torch.zeros(1, 1, 1, 1, 1, device=DEVICE))
    other = unconditioned._replace(
        images=[(key + 1, value * float("inf")) for key, value in case.images]
    )
    (out,), (again,) = run(unconditioned, fused_attention), run(other, fused_attention)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(*case[:3]), atol=2e-3, rtol=2e-3)
    assert torch.equal(out, again)
    gradient = torch.randn_like(out)
    by_image = run(unconditioned, fused_attention, gradient)[2:]
    assert not any(x.any() for x in by_image)


def test_nothing_is_copied_that_need_not_be() -> None:
    case = draw(torch.float16, 40, (4,), one=True)
    images = packed(case.images)
    assert images.key.data_ptr() == case.images[0][0].data_ptr()
    assert images.key.shape == (1, 1, 4, 40)
    (out,) = run(case, fused_attention)
    assert out.transpose(1, 2).is_contiguous()
    several = packed([*case.images, *draw(torch.float16, 40, (7,)).images])
    assert several.offsets.tolist() == [0, 4, 11]
    assert several.tokens == (4, 7)


@torch.no_grad()
def test_one_operator() -> None:
    case = draw(torch.float16, 40, (4, 3), queries=3, texts=3)
    images = packed(case.images)
    with Counted() as counted:
        fused_attention(*case[:3], images, case.weights)
    assert counted.names == ["imprompt.decoupled_attention.default"]


# looked at by the compiler
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_in_one_graph() -> None:
    torch.manual_seed(5)
    case = draw(torch.float16, 40, (4, 3), queries=7, texts=5)
    gradient = torch.randn_like(case.query)
    compiled = torch.compile(fused_attention, fullgraph=True, backend="aot_eager")
    for x, expected in zip(
        run(case, compiled, gradient), run(case, fused_attention, gradient), strict=True
    ):
        assert torch.equal(x, expected)


@pytest.mark.parametrize("trained", [False, True])
def test_operator_is_registered_as_torch_asks(trained: bool) -> None:
    torch.manual_seed(6)
    case = draw(torch.float16, 40, (4,), queries=3, texts=3, batch=1)
    images = packed(case.images)
    query, key, value = (
        x.detach().requires_grad_(trained) for x in (case.query, images.key, images.value)
    )
    torch.library.opcheck(
        fused.forward, (query, *case[1:3], key, value, images.offsets, case.weights, trained)
    )


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from imprompt.attention import fused, kernels

def kind(name, dtype):
    if name in ("q", "k", "v", "ik", "iv", "g", "out", "dq", "dk", "dv"):
        return "*fp32" if name in ("dk", "dv") else "*" + dtype
    if name in FLOATS:
        return "fp32"
    return {"offsets": "*i32", "w": "*fp32", "lse": "*fp32", "delta": "*fp32"}.get(name, "i32")

FLOATS = ("scale", "to_gradient")
LAUNCHES = (
    (kernels.forward_kernel, fused.FORWARD),
    (kernels.query_kernel, fused.QUERIES),
    (kernels.image_kernel, fused.IMAGES),
)
for architecture, dtype, width in ((80, "fp16", 40), (90, "bf16", 160)):
    for kernel, launch in LAUNCHES:
        shape = (8, width, *fused.head_parts(width))
        constants = {"shape": shape, "block": launch.block, "keep": True}
        kinds, aligned = {}, {}
        for number, parameter in enumerate(kernel.params):
            constant = parameter.is_constexpr
            kinds[parameter.name] = "constexpr" if constant else kind(parameter.name, dtype)
            pointer = kinds[parameter.name][0] == "*"
            assert constant or parameter.do_not_specialize or parameter.name in FLOATS or pointer
            if kinds[parameter.name][0] == "*" and not parameter.do_not_specialize_on_alignment:
                aligned[(number,)] = [["tt.divisibility", 16]]
        here = {name: value for name, value in constants.items() if name in kinds}
        target = GPUTarget("cuda", architecture, 32)
        source = ASTSource(kernel, kinds, here, aligned)
        built = triton.compile(source, target=target, options=fused.options(launch))
        assert built.metadata.shared <= 99 << 10, built.metadata.shared
        assert "ld.global.b16" not in built.asm["ptx"], "numbers are loaded one by one"
        print(architecture, width, kernel.fn.__name__, built.metadata.shared)
"""


def test_kernels_compile_for_gpus() -> None:
    """Not only in the interpreter, which takes what the compiler refuses: on GPUs that need not be
    here, in another process.

    No integer is a constant of a kernel; shared memory is within the smallest GPUs'; numbers are
    loaded 16 bytes at a time.
    """
    outside = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], capture_output=True, text=True, env=outside, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.splitlines()) == 6


def test_what_cannot_be_computed_is_reported() -> None:
    case = draw(torch.float16, 40, (4,), queries=3, texts=3)
    images = packed(case.images)
    with pytest.raises(MismatchError, match="no gradient of the text"):
        fused_attention(
            case.query, case.key.detach().requires_grad_(), case.value, images, case.weights
        )
    with pytest.raises(
        MismatchError, match="prepared for a batch of 3, the base model runs a batch of 2"
    ):
        fused_attention(
            *case[:3],
            packed([(k[:1].expand(3, -1, -1, -1),) * 2 for k, _ in case.images]),
            case.weights,
        )
    with pytest.raises(
        MismatchError, match="prepared for a batch of 2, the base model runs a batch of 3"
    ):
        packed([*case.images, (case.key[:1].expand(3, -1, -1, -1),) * 2])
    with pytest.raises(
        MismatchError, match=r"weights of shape \[2, 1, 1, 1, 1\]: give \(1, 2 or 1, 1, 3 or 1, 1\)"
    ):
        fused_attention(*case[:3], images, torch.ones(2, 1, 1, 1, 1, device=DEVICE))


def test_usable() -> None:
    case = draw(torch.float16, 40, (4,), queries=3, texts=3)
    images = packed(case.images)
    assert usable(*case[:3], images, case.weights)
    assert not usable(case.query.float(), *case[1:3], images, case.weights)
    assert not usable(case.query, case.key.bfloat16(), case.value, images, case.weights)
    assert not usable(*case[:3], images, case.weights.requires_grad_())
    wide = draw(torch.float16, 168, (4,), queries=3, texts=3)
    assert not usable(*wide[:3], packed(wide.images), case.weights.detach())


def test_the_faster_is_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autotune, "FASTER", {})
    times = {fused_attention: 1.0, reference: 2.0}
    timed = []

    def milliseconds(attend: Any, *_: Any) -> float:
        timed.append(attend)
        return times[attend]

    monkeypatch.setattr(autotune, "milliseconds", milliseconds)
    case, longer = (draw(torch.float16, 40, (4,), queries=3, texts=n) for n in (3, 4))
    for _ in range(2):
        assert autotune.benchmark(
            *case[:3], packed(case.images), case.weights, fused_attention, reference
        )
    assert timed == [fused_attention, reference]
    times[reference] = 0.5
    assert not autotune.benchmark(
        *longer[:3], packed(longer.images), longer.weights, fused_attention, reference
    )


def test_a_kernel_that_fails_has_lost(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def milliseconds(*_: Any) -> float:
        raise RuntimeError("out of resource: shared memory\nmore")

    monkeypatch.setattr(autotune, "FASTER", {})
    monkeypatch.setattr(autotune, "milliseconds", milliseconds)
    case = draw(torch.float16, 40, (4,), queries=3, texts=3)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert not autotune.benchmark(
                *case[:3], packed(case.images), case.weights, fused_attention, reference
            )
    assert [record.message for record in caplog.records] == [
        "fused attention is not used: out of resource: shared memory"
    ]


@pytest.mark.skipif(DEVICE == "cpu", reason="timing needs a GPU")
@pytest.mark.parametrize("trained", [False, True])
def test_timing_on_this_gpu(
    trained: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(autotune, "FASTER", {})
    case = draw(torch.float16, 40, (4,), heads=8, queries=1024, texts=77)
    autotune.benchmark(
        case.query.requires_grad_(trained),
        *case[1:3],
        packed(case.images),
        case.weights,
        fused_attention,
        reference,
    )
    assert not caplog.records
