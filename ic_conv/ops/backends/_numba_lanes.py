# SPDX-License-Identifier: Apache-2.0
"""Vector registers of float32 values in Numba code. Imports Numba, so import this file only to run such code.

Arrays are addressed by an index that counts float32 values from their start, whatever their shape and
strides. A tuple of registers holds independent sums, which a processor computes side by side.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

FUSED = ("contract",)  # lets LLVM fuse a multiply and an add; NaN and infinity stay exact
FLOAT, INT32, BYTE = ir.FloatType(), ir.IntType(32), ir.IntType(8)


class Lanes(types.Type):
    """A vector register of `width` float32 values."""

    def __init__(self, width: int) -> None:
        self.width = width
        super().__init__(f"Lanes({width})")


@register_model(Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, lanes: Lanes) -> None:
        super().__init__(manager, lanes, ir.VectorType(FLOAT, lanes.width))


def _address(context: Any, builder: Any, array_type: Any, array: Any, *indices: Any) -> Any:
    """Pointer to the element at the sum of some indices."""
    address = context.make_array(array_type)(context, builder, array).data
    for index in indices:
        address = builder.gep(address, [index])
    return address


def _load(builder: Any, address: Any, vector: Any) -> Any:
    return builder.load(builder.bitcast(address, vector.as_pointer()), align=4)


def _write(builder: Any, vector: Any, address: Any) -> None:
    builder.store(vector, builder.bitcast(address, vector.type.as_pointer()), align=4)


def _mixed(builder: Any, left: Any, right: Any, order: list[int]) -> Any:
    """The elements of two vectors, numbered on, in this order."""
    return builder.shuffle_vector(left, right, ir.Constant(ir.VectorType(INT32, len(order)), order))


def _unpacked(builder: Any, values: Any) -> list[Any]:
    return [builder.extract_value(values, i) for i in range(values.type.count)]


@intrinsic(prefer_literal=True)
def zeros(typing: Any, width: Any, like: Any) -> Any:
    """As many registers of zeros as `like` has elements."""
    registers = types.UniTuple(Lanes(width.literal_value), len(like))

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vector = context.get_value_type(registers.dtype)
        zero = ir.Constant(vector, [0.0] * vector.count)
        return context.make_tuple(builder, registers, [zero] * len(registers))

    return registers(width, like), build


@intrinsic
def add_taps(  # type: ignore[no-untyped-def]
    typing, sums, weight, taps, tap, ahead, source, pixels, pixel
):
    """For each register: sum + weight[taps[.] + tap] * source[pixels[.] + pixel : ... + width].

    Where there are several, weights `ahead` of the first one's are fetched into the cache.
    """

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        # Empty assembly keeps LLVM from unrolling the loop around it, for which registers do not suffice.
        builder.asm(ir.FunctionType(ir.VoidType(), []), "", "", [], True)
        vector = context.get_value_type(sums.dtype)
        undefined = ir.Constant(vector, ir.Undefined)
        sums_, starts, pixels_ = (_unpacked(builder, args[i]) for i in (0, 2, 6))
        if len(sums) > 1:
            _prefetch(builder, _address(context, builder, weight, args[1], starts[0], args[3], args[4]))
        results = []
        for total, start, first_lane in zip(sums_, starts, pixels_, strict=True):
            scalar = builder.load(_address(context, builder, weight, args[1], start, args[3]))
            first = builder.insert_element(undefined, scalar, INT32(0))
            scale = _mixed(builder, first, undefined, [0] * vector.count)
            values = _load(builder, _address(context, builder, source, args[5], first_lane, args[7]), vector)
            results.append(builder.fadd(total, builder.fmul(scale, values, flags=FUSED), flags=FUSED))
        return context.make_tuple(builder, sums, results)

    return sums(sums, weight, taps, tap, ahead, source, pixels, pixel), build


def _prefetch(builder: Any, address: Any) -> None:
    """Asks for a cache line; an address outside of the array does no harm."""
    function = ir.FunctionType(ir.VoidType(), [BYTE.as_pointer(), INT32, INT32, INT32])
    prefetch = cgutils.get_or_insert_function(builder.module, function, "llvm.prefetch.p0")
    builder.call(prefetch, [builder.bitcast(address, BYTE.as_pointer()), INT32(0), INT32(3), INT32(1)])


@intrinsic
def store(typing: Any, values: Any, target: Any, index: Any, step: Any) -> Any:
    """target[index : index + width] = first register, the next one `step` further, and so on."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> None:
        address = _address(context, builder, target, args[1], args[2])
        for vector in _unpacked(builder, args[0]):
            _write(builder, vector, address)
            address = builder.gep(address, [args[3]])

    return types.void(values, target, index, step), build


@intrinsic(prefer_literal=True)
def dot(typing: Any, width: Any, a: Any, i: Any, b: Any, j: Any) -> Any:
    """Sum of a[i : i + width] * b[j : j + width]."""
    lanes = Lanes(width.literal_value)

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vector = context.get_value_type(lanes)
        left = _load(builder, _address(context, builder, a, args[1], args[2]), vector)
        right = _load(builder, _address(context, builder, b, args[3], args[4]), vector)
        reduce_type = ir.FunctionType(FLOAT, [FLOAT, vector])
        name = f"llvm.vector.reduce.fadd.v{lanes.width}f32"
        reduce = cgutils.get_or_insert_function(builder.module, reduce_type, name)
        return builder.call(reduce, [FLOAT(0.0), builder.fmul(left, right)], fastmath=("reassoc",))

    return types.float32(width, a, i, b, j), build


@intrinsic
def transpose4(typing: Any, a: Any, i: Any, a_step: Any, b: Any, j: Any, b_step: Any) -> Any:
    """b[j + c * b_step + r] = a[i + r * a_step + c] for r and c below 4."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> None:
        vector = ir.VectorType(FLOAT, 4)

        def steps(array: Any, type_: Any, start: Any, step: Any) -> list[Any]:
            addresses = [_address(context, builder, type_, array, start)]
            for _ in range(3):
                addresses.append(builder.gep(addresses[-1], [step]))
            return addresses

        rows = [_load(builder, address, vector) for address in steps(args[0], a, args[1], args[2])]
        low = [_mixed(builder, rows[r], rows[r + 1], [0, 4, 1, 5]) for r in (0, 2)]
        high = [_mixed(builder, rows[r], rows[r + 1], [2, 6, 3, 7]) for r in (0, 2)]
        orders = ([0, 1, 4, 5], [2, 3, 6, 7])
        columns = [_mixed(builder, left, right, order) for left, right in (low, high) for order in orders]
        for column, address in zip(columns, steps(args[3], b, args[4], args[5]), strict=True):
            _write(builder, column, address)

    return types.void(a, i, a_step, b, j, b_step), build
