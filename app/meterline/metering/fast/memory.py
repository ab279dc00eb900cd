"""Bytes in arrays by the word and by the piece, for kernels.

A loop over single bytes costs a kernel more than all it does with them: an index that may be negative is
looked at each time, and eight bytes are eight steps. These take a whole word or piece in one. Indexes are
trusted, here as everywhere in the kernels, and not negative.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from meterline.metering.fast.jit import compiled

__all__ = [
    "PADDING_BYTES",
    "clear",
    "copy",
    "is_ascii",
    "is_equal",
    "kernel_part",
    "power_of_two",
    "prefetch",
    "word_at",
    "words_hash",
]

PADDING_BYTES = 8
"""So many bytes behind a text must be there to be read, whatever they are: its last word is read whole."""

WORD = np.uint64
SPREAD = WORD(0x9E3779B97F4A7C15)
HIGHEST_BITS = WORD(0x8080808080808080)


def kernel_part(typed: Callable[..., Any]) -> Any:
    """What numba calls an intrinsic: Any, because a kernel calls it with other arguments than numba does."""
    return intrinsic(typed)


def _pointer(context: Any, builder: Any, array_type: Any, array: Any, at: Any) -> Any:
    held = context.make_array(array_type)(context, builder, array)
    return cgutils.pointer_add(builder, held.data, at)


@kernel_part
def word_at(_context: Any, data: Any, _at: Any) -> Any:
    """The eight bytes that begin there, as a little-endian number."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word = ir.IntType(64)
        where = _pointer(context, builder, signature.args[0], *arguments)
        loaded = builder.load(builder.bitcast(where, word.as_pointer()))
        loaded.align = 1
        return loaded

    return types.uint64(data, types.intp), generate


@kernel_part
def copy(_context: Any, out: Any, _at: Any, data: Any, _start: Any, _length: Any) -> Any:
    """Copy `length` bytes of one array into another one."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        to, at, data, start, length = arguments
        target = _pointer(context, builder, signature.args[0], to, at)
        source = _pointer(context, builder, signature.args[2], data, start)
        cgutils.raw_memcpy(builder, target, source, length, 1)
        return context.get_dummy_value()

    return types.void(out, types.intp, data, types.intp, types.intp), generate


@kernel_part
def clear(_context: Any, out: Any, _at: Any, _length: Any) -> Any:
    """Set `length` bytes to zero."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array, at, length = arguments
        target = _pointer(context, builder, signature.args[0], array, at)
        cgutils.memset(builder, target, length, 0)
        return context.get_dummy_value()

    return types.void(out, types.intp, types.intp), generate


@kernel_part
def prefetch(_context: Any, table: Any, _row: Any) -> Any:
    """Have a row of a table brought near: it is read soon, and waited for no longer."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        held = context.make_array(signature.args[0])(context, builder, arguments[0])
        row_bytes = builder.extract_value(held.strides, 0)
        where = cgutils.pointer_add(builder, held.data, builder.mul(arguments[1], row_bytes))
        byte, flag = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, flag, flag, flag])
        call = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
        builder.call(call, [builder.bitcast(where, byte), flag(0), flag(3), flag(1)])
        return context.get_dummy_value()

    return types.void(table, types.intp), generate


@compiled
def _last_word(data: Any, at: int, length: int) -> Any:
    """The last one to eight bytes of a text; what stands behind them is cut off."""
    return word_at(data, at) << WORD(64 - 8 * length)


@compiled
def words_hash(data: Any, at: int, length: int) -> Any:
    """A number for a text: the same for the same bytes, and seldom for others."""
    h = WORD(length)
    while length > 8:
        h = (h ^ word_at(data, at)) * SPREAD
        h ^= h >> WORD(32)
        at += 8
        length -= 8
    if length > 0:
        h = (h ^ _last_word(data, at, length)) * SPREAD
        h ^= h >> WORD(32)
    return h


@compiled
def is_ascii(data: Any, at: int, length: int) -> bool:
    """Whether no byte of a text has its highest bit set."""
    every = WORD(0)
    while length > 8:
        every |= word_at(data, at)
        at += 8
        length -= 8
    if length > 0:
        every |= _last_word(data, at, length)
    return every & HIGHEST_BITS == WORD(0)


@compiled
def is_equal(data: Any, at: int, other: Any, other_at: int, length: int) -> bool:
    """Whether two texts of this length are the same."""
    while length > 8:
        if word_at(data, at) != word_at(other, other_at):
            return False
        at += 8
        other_at += 8
        length -= 8
    return length == 0 or _last_word(data, at, length) == _last_word(other, other_at, length)


def power_of_two(at_least: int) -> int:
    """The smallest that is no less: how large a table with a mask is made."""
    return 1 << (at_least - 1).bit_length()
