"""Weights of eight bits: every row of a linear layer's weight is int8 or fp8 (e4m3) numbers times one float32 scale.

Where a row's length allows it, its numbers lie interleaved: byte i of word 16 b + j is the number of column
64 b + 16 i + j (i < 4, j < 16). In a matrix product a thread has two neighbouring columns of 16 and
the two eight beyond: by words it loads four times as much at once, and nothing moves between threads.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from tidar.kernels.launch import tl, triton

KINDS = {"int8": (torch.int8, 127.0), "fp8": (torch.float8_e4m3fn, 448.0)}
"""The type of the numbers, and the largest one that is used."""
BLOCK = 64
"""Columns that are interleaved with each other."""


@dataclass(frozen=True)
class QuantWeight:
    """values [N, K] int8 or fp8, interleaved if BLOCK divides K; scale [N] float32. The weight is their product."""

    values: Tensor
    scale: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scale.nbytes

    @property
    def kind(self) -> str:
        return next(kind for kind, (dtype, _) in KINDS.items() if dtype == self.values.dtype)

    @property
    def interleaved(self) -> bool:
        return self.values.shape[-1] % BLOCK == 0

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, rows: slice | Tensor) -> QuantWeight:
        """Some rows; ids [...] give a weight [..., K]."""
        return QuantWeight(self.values[rows], self.scale[rows])

    def to(self, dtype: torch.dtype) -> Tensor:
        """The weight itself [N, K], each number rounded to `dtype` once."""
        weight = torch.empty(self.shape, dtype=dtype, device=self.values.device)
        if self.interleaved:
            weight.unflatten(-1, (-1, 4, 16)).copy_(self.values.unflatten(-1, (-1, 16, 4)).transpose(-1, -2))
        else:
            weight.copy_(self.values)
        return weight.mul_(self.scale[..., None])


def quantise(weight: Tensor, kind: str) -> QuantWeight:
    """The nearest numbers to weight [N, K], scaled so that the largest of a row is the largest of its kind."""
    dtype, most = KINDS[kind]
    scale = weight.abs().amax(-1).float() / most
    ratio = (weight / scale.clamp(min=torch.finfo(torch.float32).tiny)[:, None]).clamp_(-most, most)
    values = (ratio.round_() if kind == "int8" else ratio).to(dtype)
    if weight.shape[-1] % BLOCK == 0:
        values = values.view(torch.uint8).unflatten(-1, (-1, 4, 16)).transpose(-1, -2).flatten(-3).view(dtype)
    return QuantWeight(values, scale)


def stack(weights: list[QuantWeight]) -> QuantWeight:
    """All their rows in one piece of memory."""
    return QuantWeight(torch.cat([w.values for w in weights]), torch.cat([w.scale for w in weights]))


# PTX from t, whose halves each hold a number twice, in the lower and in the upper byte, to two 16-bit floats.
# Integers: the numbers' bits become the lowest of a float with a known exponent, from which what is too much is taken.
# fp8: sign, exponent and mantissa move to where the float has them, and 2^120 or 2^8 makes up for the other bias.
_MAKE = {
    (torch.int8, torch.bfloat16): (
        "mov.b32 c, 0xBF80BF80;",
        "lop3.b32 u, t, 0x007F007F, 0x43004300, 0xEA; lop3.b32 v, t, 0x00800080, 0x43004300, 0xEA; "
        "fma.rn.bf16x2 {to}, v, c, u;",
    ),
    (torch.int8, torch.float16): (
        "mov.b32 c, 0xE480E480;",
        "lop3.b32 u, t, 0x00FF00FF, 0x64806480, 0x6A; add.f16x2 {to}, u, c;",
    ),
    (torch.float8_e4m3fn, torch.bfloat16): (
        "mov.b32 c, 0x7B807B80; mov.b32 z, 0x80008000;",
        "shr.u32 u, t, 4; and.b32 v, t, 0x80008000; lop3.b32 u, u, 0x07F007F0, v, 0xEA; fma.rn.bf16x2 {to}, u, c, z;",
    ),
    (torch.float8_e4m3fn, torch.float16): (
        "mov.b32 c, 0x5C005C00;",
        "shr.u32 u, t, 1; and.b32 v, t, 0x80008000; lop3.b32 u, u, 0x3F803F80, v, 0xEA; mul.f16x2 {to}, u, c;",
    ),
}


def unpacking(numbers: torch.dtype, to: torch.dtype) -> str:
    """PTX that makes two words ($4 and $5) four pairs ($0 to $3) of 16-bit floats; empty where there is none."""
    if (numbers, to) not in _MAKE or triton is None or triton.knobs.runtime.interpret:
        return ""
    return _unpacking(numbers, to)


@functools.cache
def _unpacking(numbers: torch.dtype, to: torch.dtype) -> str:
    constants, make = _MAKE[numbers, to]
    each = (f"prmt.b32 t, $4, $5, 0x{4 + i}{4 + i}{i}{i}; {make.format(to=f'${i}')}" for i in range(4))
    return "\n".join(("{ .reg .b32 t, u, v, c, z;", constants, *each, "}"))


if triton is not None:

    @triton.jit
    def natural(byte):
        """The column whose number lies at this byte of an interleaved row."""
        return byte // 64 * 64 + byte % 4 * 16 + byte % 64 // 4

    @triton.jit
    def unpack(words, x, INTEGER: tl.constexpr, ASM: tl.constexpr):
        """[N, 4 W] numbers of int32 words [N, W], by column, as what x points to. ASM is what `unpacking` says."""
        first, second, third, fourth = _tiles(words, x, INTEGER, ASM)
        four = tl.join(tl.join(first, third), tl.join(second, fourth))  # [N, W, 2, 2], the last two in order
        blocks = four.reshape(words.shape[0], words.shape[1] // 16, 16, 4)
        return blocks.permute(0, 1, 3, 2).reshape(words.shape[0], 4 * words.shape[1])

    @triton.jit
    def _tiles(words, x, INTEGER: tl.constexpr, ASM: tl.constexpr):
        """[N, W] each: the numbers 0, 1, 2 and 3 of words."""
        kind = x.dtype.element_ty
        if ASM != "":
            return tl.inline_asm_elementwise(ASM, "=r,=r,=r,=r,r,r", [words], [kind, kind, kind, kind], True, 2)
        if INTEGER:
            return (
                (words << 24 >> 24).to(kind),
                (words << 16 >> 24).to(kind),
                (words << 8 >> 24).to(kind),
                (words >> 24).to(kind),
            )
        return (
            _fp8(words).to(kind),
            _fp8(words >> 8).to(kind),
            _fp8(words >> 16).to(kind),
            _fp8(words >> 24).to(kind),
        )

    @triton.jit
    def _fp8(words):
        """The lowest bytes, as float32: its bias of the exponent is larger by 120."""
        bits = (words & 0x80) << 24 | (words & 0x7F) << 20
        return bits.to(tl.float32, bitcast=True) * 1.329227995784916e36
