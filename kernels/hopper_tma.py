"""The copy engine's two operations by one name each: Triton 3.9 refuses the names that 3.6 has for them.

    load(descriptor, [row, column], barrier, tile)    global memory into a shared tile; the barrier counts its bytes
    store(descriptor, [row, column], tile)            a shared tile to global memory

Both are asynchronous, and for use in kernels only.
"""

from triton.experimental.gluon.language.nvidia.hopper import tma

load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
