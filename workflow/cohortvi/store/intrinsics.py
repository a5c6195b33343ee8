"""What compiled code needs and numba has no word for: addresses, caches, atomic counts, sums in vectors; in LLVM's own.

The loops that use these are cached on disk, and numba does not notice there when something here changes: remove
`__pycache__` then.
"""

from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

LINE = 64  # bytes of a cache line
LANES = 16  # values summed up at once


@intrinsic
def address(typingctx: Any, array: Any, index: Any) -> tuple:
    """Return the address of array[index]."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        return builder.bitcast(builder.gep(data, [arguments[1]]), context.get_value_type(types.voidptr))

    return types.voidptr(array, types.uint64), generate


@intrinsic
def pointer(typingctx: Any, address: Any) -> tuple:
    """Return an address as a pointer."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.uint64), generate


@intrinsic
def claim(typingctx: Any, claimed: Any) -> tuple:
    """Return claimed[0] and count it up, so that no other thread gets the same number."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        return builder.atomic_rmw("add", data, ir.IntType(64)(1), "monotonic")

    return types.int64(claimed), generate


@intrinsic
def prefetch(typingctx: Any, array: Any, index: Any) -> tuple:
    """Have the cache line of array[index] fetched, without waiting for it."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        place = builder.bitcast(builder.gep(data, [arguments[1]]), ir.IntType(8).as_pointer())
        number = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [place.type, number, number, number])
        instruction = builder.module.declare_intrinsic("llvm.prefetch", [place.type], kind)
        builder.call(instruction, [place, number(0), number(3), number(1)])  # to be read, kept in all caches, data
        return context.get_dummy_value()

    return types.void(array, types.uint64), generate


@intrinsic
def stream_line(typingctx: Any, to: Any, at: Any, source: Any, begin: Any) -> tuple:
    """Write LINE bytes, source[begin] and on, to to[at] and on, past the caches; to[at] begins a line."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        to, at, source, begin = arguments
        line = ir.VectorType(ir.IntType(32), LINE // 4).as_pointer()
        target = builder.gep(context.make_array(signature.args[0])(context, builder, to).data, [at])
        origin = builder.gep(context.make_array(signature.args[2])(context, builder, source).data, [begin])
        value = builder.load(builder.bitcast(origin, line), align=1)
        store = builder.store(value, builder.bitcast(target, line), align=LINE)
        store.set_metadata("nontemporal", builder.module.add_metadata([ir.IntType(32)(1)]))
        return context.get_dummy_value()

    return types.void(to, types.uint64, source, types.uint64), generate


@intrinsic
def sum_lanes(typingctx: Any, planes: Any, low: Any, high: Any, out: Any, at: Any, total: Any) -> tuple:
    """Write the running sum of LANES differences, begun at `total`, to out[at] and on; return the last one.

    The bytes of the differences are planes[low] and planes[high] and on. One after the other, sums wait for each other:
    here all lanes add what lies 1, 2, 4 ... lanes before them (Hillis & Steele 1986, Data parallel algorithms).
    """
    wide, narrow = (ir.VectorType(ir.IntType(bits), LANES) for bits in (16, 8))
    number = ir.IntType(32)

    def lanes(indices: Any) -> ir.Constant:
        return ir.Constant(ir.VectorType(number, LANES), list(indices))

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        planes, low, high, out, at, total = arguments
        source = context.make_array(signature.args[0])(context, builder, planes).data
        target = context.make_array(signature.args[3])(context, builder, out).data

        def plane(begin: Any) -> Any:
            place = builder.bitcast(builder.gep(source, [begin]), narrow.as_pointer())
            return builder.zext(builder.load(place, align=1), wide)

        zeros = ir.Constant(wide, [0] * LANES)
        values = builder.or_(plane(low), builder.shl(plane(high), ir.Constant(wide, [8] * LANES)))
        step = 1
        while step < LANES:
            before = lanes(k - step if k >= step else LANES for k in range(LANES))
            values, step = builder.add(values, builder.shuffle_vector(values, zeros, before)), 2 * step
        begun = builder.insert_element(zeros, total, number(0))
        values = builder.add(values, builder.shuffle_vector(begun, zeros, lanes([0] * LANES)))
        builder.store(values, builder.bitcast(builder.gep(target, [at]), wide.as_pointer()), align=2)
        return builder.extract_element(values, number(LANES - 1))

    return types.uint16(planes, types.uint64, types.uint64, out, types.uint64, types.uint16), generate
