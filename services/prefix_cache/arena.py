"""The memory that holds the pages: anonymous, shared by passing its descriptor, never by a name.

So nothing is left behind when this process is killed, whatever an engine still has mapped stays valid, and nobody can cut
it short under a reader. All of it is claimed at the start: running out of memory is one clear error, here.
"""

import fcntl
import mmap
import os
import sys
import tempfile

from shared.config import ConfigError
from shared.host import free_memory


class Arena:
    """Raises ConfigError when there is not that much memory."""

    def __init__(self, size: int) -> None:
        if size > free_memory():
            raise ConfigError(
                f"HEADRACE_PREFIX_CACHE_SIZE_MB={size >> 20} is more than the {free_memory() >> 20} MB that are free"
            )
        self.size = size
        self.fd = _memory(size)
        self.view = memoryview(mmap.mmap(self.fd, size))

    def store(self, offset: int, data: bytes) -> None:
        os.pwrite(self.fd, data, offset)


def _memory(size: int) -> int:
    if sys.platform != "linux":
        with tempfile.TemporaryFile() as file:
            os.ftruncate(file.fileno(), size)
            return os.dup(file.fileno())
    fd = os.memfd_create("headrace-prefix-cache", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        raise ConfigError(f"HEADRACE_PREFIX_CACHE_SIZE_MB={size >> 20}: {error.strerror}") from error
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return fd
