"""LLVM as the compiler of the CPU kernels: a few words over llvmlite, so that a kernel reads like C with intrinsics.

No compiler is needed where Headrace runs: llvmlite brings one.
"""

import functools
import struct
from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import binding, ir

I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
F16, F32 = ir.HalfType(), ir.FloatType()
POINTER, VOID = ir.PointerType(), ir.VoidType()
Value = Any  # llvmlite has no types
Module = ir.Module

NEEDED = ("avx2", "fma", "f16c")


def vector(of: Value, lanes: int) -> Value:
    return ir.VectorType(of, lanes)


def function_type(*arguments: Value) -> Value:
    return ir.FunctionType(VOID, arguments)


def pointer_to(kind: Value) -> Value:
    return ir.PointerType(kind)


def number(value: int, of: Value = I64) -> Value:
    return ir.Constant(of, value)


def real(value: float) -> Value:
    return ir.Constant(F32, value)


def every(of: Value, value: float, lanes: int) -> Value:
    return ir.Constant(vector(of, lanes), [value] * lanes)


class Function:
    """One function under construction. Offsets are bytes, given as a number or as a value."""

    def __init__(self, module: Value, name: str, arguments: Sequence[Value]) -> None:
        self.module = module
        self.value = ir.Function(module, ir.FunctionType(VOID, arguments), name)
        self.arguments = self.value.args
        self.build = ir.IRBuilder(self.value.append_basic_block())

    def at(self, base: Value, offset: Value | int) -> Value:
        return self.build.gep(base, [number(offset) if isinstance(offset, int) else offset], source_etype=I8)

    def load(self, base: Value, offset: Value | int, of: Value) -> Value:
        return self.build.load(self.at(base, offset), typ=of, align=1)

    def store(self, value: Value, base: Value, offset: Value | int) -> None:
        self.build.store(value, self.at(base, offset), align=1)

    def times(self, value: Value, factor: int) -> Value:
        return self.build.mul(value, number(factor))

    def spread(self, value: Value, lanes: int) -> Value:
        """The same value in every lane."""
        empty = ir.Constant(vector(value.type, lanes), ir.Undefined)
        return self.build.shuffle_vector(self.build.insert_element(empty, value, number(0, I32)), empty, every(I32, 0, lanes))

    def call(self, name: str, result: Value, *values: Value) -> Value:
        """A function of this module, an intrinsic of LLVM, or one that `compile` is given an address for."""
        known = self.module.globals.get(name)
        if known is None:
            known = ir.Function(self.module, ir.FunctionType(result, [value.type for value in values]), name)
        return self.build.call(known, values)

    def machine(self, text: str, constraints: str, *values: Value) -> Value:
        """An instruction as it is, where LLVM would find another for the intrinsic; gives the first operand's type."""
        kind = ir.FunctionType(values[0].type, [value.type for value in values])
        return self.build.asm(kind, text, constraints, values, side_effect=False)

    def same(self, name: str, *values: Value) -> Value:
        """An intrinsic that is overloaded on its operands' type, which is also its result's."""
        kind = values[0].type
        suffix = f"v{kind.count}f32" if isinstance(kind, ir.VectorType) else "f32"
        return self.call(f"llvm.{name}.{suffix}", kind, *values)

    def prefetch(self, base: Value, offset: int, near: bool = True) -> None:
        """Bring a line that will be read soon into the nearest cache, or the next, which waits for more of them at once."""
        words = (number(value, I32) for value in (0, 3 if near else 2, 1))  # for reading, how near, data: it need not exist
        self.call("llvm.prefetch.p0", VOID, self.at(base, offset), *words)

    def load_shared(self, base: Value, offset: int) -> Value:
        """A 64-bit number that other threads write."""
        return self.build.load_atomic(self.at(base, offset), "seq_cst", 8, typ=I64)

    def store_shared(self, value: Value, base: Value, offset: int) -> None:
        self.build.atomic_rmw("xchg", self.at(base, offset), value, "seq_cst")

    def repeat(self, body: Callable[[list[Value]], tuple[list[Value], Value]], carried: Sequence[Value] = ()) -> list[Value]:
        """do { next values, again = body(values) } while (again): the last values"""
        build, before = self.build, self.build.block
        inside, after = (self.value.append_basic_block() for _ in range(2))
        build.branch(inside)
        build.position_at_end(inside)
        values = [build.phi(value.type) for value in carried]
        following, again = body(list(values))
        for phi, value, next_value in zip(values, carried, following, strict=True):
            phi.add_incoming(value, before)
            phi.add_incoming(next_value, build.block)
        build.cbranch(again, inside, after)
        build.position_at_end(after)
        return following

    def loop(
        self,
        stop: Value,
        body: Callable[[Value, list[Value]], list[Value] | None],
        carried: Sequence[Value] = (),
        start: Value | None = None,
        step: int = 1,
    ) -> list[Value]:
        """for (i = start; i < stop; i += step): body(i, carried) gives the next carried values; the last are returned."""
        build, before = self.build, self.build.block
        head, inside, after = (self.value.append_basic_block() for _ in range(3))
        build.branch(head)
        build.position_at_end(head)
        index, values = build.phi(I64), [build.phi(value.type) for value in carried]
        build.cbranch(build.icmp_signed("<", index, stop), inside, after)
        build.position_at_end(inside)
        following = [build.add(index, number(step)), *(body(index, values) or ())]
        first = [number(0) if start is None else start, *carried]
        for phi, value, next_value in zip([index, *values], first, following, strict=True):
            phi.add_incoming(value, before)
            phi.add_incoming(next_value, build.block)
        build.branch(head)
        build.position_at_end(after)
        return values

    def choose(self, selector: Value, cases: Sequence[int], body: Callable[[int], None]) -> None:
        """body(case) where the selector is one of the cases; nothing where it is none of them."""
        blocks = [self.value.append_basic_block() for _ in cases]
        after = self.value.append_basic_block()
        switch = self.build.switch(selector, after)
        for case, block in zip(cases, blocks, strict=True):
            switch.add_case(number(case), block)
            self.build.position_at_end(block)
            body(case)
            self.build.branch(after)
        self.build.position_at_end(after)


@functools.cache
def has(*names: str) -> bool:
    """Whether this machine has these instructions, by LLVM's names."""
    features = binding.get_host_cpu_features()
    return all(features.get(name, False) for name in names)


def available() -> bool:
    """Whether this machine can run the kernels: x86-64 with the instructions they name."""
    return struct.calcsize("P") == 8 and has(*NEEDED)


_engines: list[Any] = []  # own the machine code, which lives as long as the process


def compile(module: Value) -> Callable[[str], int]:
    """Machine code for this very processor; the answer gives the address of each function."""
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    binding.initialize_native_asmparser()
    parsed = binding.parse_assembly(str(module))
    target = binding.Target.from_default_triple().create_target_machine(
        cpu=binding.get_host_cpu_name(), features=binding.get_host_cpu_features().flatten(), opt=3
    )
    passes = binding.create_pass_builder(target, binding.create_pipeline_tuning_options(speed_level=3))
    passes.getModulePassManager().run(parsed, passes)
    engine = binding.create_mcjit_compiler(parsed, target)
    engine.finalize_object()
    _engines.append(engine)
    address: Callable[[str], int] = engine.get_function_address
    return address
