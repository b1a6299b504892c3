"""A prefix cache as an engine sees it: one blocking connection, used by one thread at a time. Sockets, no event loop.

On the cache's host its memory is mapped here: pages are read and written in place, and only frames cross the socket. From
another host the same pages come and go as raw bytes behind the frames.
"""

import contextlib
import fcntl
import mmap
import os
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeVar

from shared.codec import Malformed, decode_talk, frame, frame_length
from shared.page import HEAD_BYTES, Buffer, slot_bytes
from shared.prefix import (
    FRAME_HEAD_BYTES,
    Commit,
    Committed,
    Find,
    Hello,
    Leased,
    Refusal,
    Release,
    Reserve,
    Send,
    Spoiled,
    Store,
    Welcome,
)
from shared.wire import Wire

CONNECT_S = 0.5  # or less, where patience is less: a host that does not answer at all
_Answer = TypeVar("_Answer", bound=Wire)


class CacheDown(Exception):
    """The cache cannot be reached, refuses us, is silent for too long or talks nonsense: do without it."""


class Lease(NamedTuple):
    """Pages of a chain from its start."""

    number: int
    slots: tuple[int, ...]


class Pages(NamedTuple):
    """Slots of a memory, by where they begin: in each a header of HEAD_BYTES, then a payload of `size` bytes."""

    memory: memoryview
    slots: Sequence[int]
    size: int

    def header(self, at: int) -> memoryview:
        return self.memory[self.slots[at] : self.slots[at] + HEAD_BYTES]

    def payload(self, at: int) -> memoryview:
        return self.memory[self.slots[at] + HEAD_BYTES :][: self.size]


class Client:
    """Raises CacheDown, here and wherever it speaks; it is then of no more use."""

    def __init__(self, address: str, space: bytes, page_bytes: int, seconds: float) -> None:
        self.limit(seconds)
        self.page_bytes = page_bytes
        self.slot_bytes = slot_bytes(page_bytes)
        self._memory: mmap.mmap | None = None
        self._fds: list[int] = []
        with self._trouble():
            self._socket = _connect(address, min(seconds, CONNECT_S))
        try:
            with self._trouble():
                self._greet(space)
        except CacheDown:
            self.close()
            raise

    def _greet(self, space: bytes) -> None:
        self._say(Hello(space=space, page_bytes=self.page_bytes))
        welcome = self._hear(Welcome)
        if welcome.slot_bytes != self.slot_bytes:
            raise Malformed(f"slots of {welcome.slot_bytes} bytes")
        if self._fds:
            self._memory = _mapped(self._fds[0], welcome.slots * welcome.slot_bytes)

    @property
    def memory(self) -> memoryview | None:
        """The cache's own, where it is on this host."""
        return None if self._memory is None else memoryview(self._memory)

    def limit(self, seconds: float) -> None:
        """How long all that follows may take, until the next limit: bytes that come one by one do not extend it."""
        self._deadline = time.monotonic() + seconds

    def _hurry(self) -> None:
        self._socket.settimeout(max(self._deadline - time.monotonic(), 0.001))

    def close(self) -> None:
        self._socket.close()
        for fd in self._fds:
            os.close(fd)
        self._fds = []  # the mapping goes with the last view of it

    # -- reading ---------------------------------------------------------------------------------------------------

    def find(self, hashes: Sequence[bytes]) -> Lease:
        """The longest run of pages from the start of a chain."""
        with self._trouble():
            leased = self._ask(Find(hashes=b"".join(hashes)), Leased)
            if len(leased.slots) > len(hashes):
                raise Malformed("more pages than were asked for")
        return Lease(leased.lease, leased.slots)

    def read(self, lease: Lease, first: int, count: int) -> Pages:
        """Pages of a lease: where they lie in the cache's own memory, or bytes that came for us. Nothing is verified yet."""
        with self._trouble():
            if self._memory is not None:
                starts = [slot * self.slot_bytes for slot in lease.slots[first : first + count]]
                if starts and not 0 <= min(starts) <= max(starts) <= len(self._memory) - self.slot_bytes:
                    raise Malformed("a page outside of the memory")
                return Pages(memoryview(self._memory), starts, self.page_bytes)
            buffer = memoryview(bytearray(count * self.slot_bytes))
            self._say(Send(lease=lease.number, first=first, pages=count))
            self._receive_into(buffer)
            return Pages(buffer, range(0, len(buffer), self.slot_bytes), self.page_bytes)

    def release(self, lease: Lease) -> None:
        if lease.number:
            with self._trouble():
                self._say(Release(lease=lease.number))

    def spoiled(self, hashes: Sequence[bytes]) -> None:
        with self._trouble():
            self._say(Spoiled(hashes=b"".join(hashes)))

    # -- writing ---------------------------------------------------------------------------------------------------

    def reserve(self, hashes: Sequence[bytes]) -> Lease:
        """Room for pages of a chain: a slot, or -1 where the page is there or being written; shorter where there is none."""
        with self._trouble():
            leased = self._ask(Reserve(hashes=b"".join(hashes)), Leased)
            if len(leased.slots) > len(hashes):
                raise Malformed("more room than was asked for")
        return Lease(leased.lease, leased.slots)

    def write(self, lease: Lease, at: int, header: bytes, payload: Buffer) -> None:
        """The page of a chain whose slot is slots[at]."""
        slot, header = lease.slots[at], header.ljust(HEAD_BYTES, b"\0")
        with self._trouble():
            if self._memory is not None:
                if os.pwritev(self._fds[0], [header, payload], slot * self.slot_bytes) != len(header) + len(payload):
                    raise Malformed("the memory ends within a page")
                return
            nth = sum(other >= 0 for other in lease.slots[:at])
            self._say(Store(lease=lease.number, at=nth))
            rest = bytes(self.slot_bytes - HEAD_BYTES - len(payload))
            for part in (header, payload, rest):
                self._hurry()
                self._socket.sendall(part)

    def commit(self, lease: Lease, pages: int) -> int:
        """The first `pages` of the slots that we were given are written. Returns how many others can find now."""
        with self._trouble():
            return self._ask(Commit(lease=lease.number, pages=pages), Committed).pages

    # -- frames ----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _trouble(self) -> Iterator[None]:
        try:
            yield
        except (OSError, EOFError, Malformed) as error:
            raise CacheDown(f"{type(error).__name__}: {error}") from error

    def _say(self, item: Wire) -> None:
        self._hurry()
        self._socket.sendall(frame(item))

    def _ask(self, item: Wire, kind: type[_Answer]) -> _Answer:
        self._say(item)
        return self._hear(kind)

    def _hear(self, kind: type[_Answer]) -> _Answer:
        head = self._receive(FRAME_HEAD_BYTES)
        answer = decode_talk(self._receive(frame_length(head)))
        if isinstance(answer, Refusal):
            raise Malformed(f"refused: {answer.why}")
        if not isinstance(answer, kind):
            raise Malformed(f"{answer.kind} is no answer")
        return answer

    def _receive(self, count: int) -> bytes:
        buffer = bytearray(count)
        self._receive_into(memoryview(buffer))
        return bytes(buffer)

    def _receive_into(self, view: memoryview) -> None:
        while view:
            self._hurry()
            if self._socket.family == socket.AF_UNIX and not self._fds:
                got, fds = self._receive_fds(view)
                self._fds += fds
            else:
                got = self._socket.recv_into(view)
            if not got:
                raise EOFError("the cache hung up")
            view = view[got:]

    def _receive_fds(self, view: memoryview) -> tuple[int, list[int]]:
        data, fds, _, _ = socket.recv_fds(self._socket, len(view), 1)
        view[: len(data)] = data
        return len(data), list(fds)


def _connect(address: str, timeout_s: float) -> socket.socket:
    if address.startswith("/"):
        made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        made.settimeout(timeout_s)
        try:
            made.connect(address)
        except OSError:
            made.close()
            raise
        return made
    host, _, port = address.rpartition(":")
    made = socket.create_connection((host.strip("[]"), int(port)), timeout_s)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return made


def _mapped(fd: int, size: int) -> mmap.mmap:
    """The cache's memory. On Linux it is sealed: nobody can cut it short while we look at it."""
    if sys.platform == "linux" and not fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
        raise Malformed("the memory is not sealed")
    if os.fstat(fd).st_size < size:
        raise Malformed("the memory is smaller than it should be")
    return mmap.mmap(fd, size)
