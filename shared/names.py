"""The names of a mesh's streams and keys."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Streams:
    """The braces keep all of a model's names in one slot of a Redis Cluster."""

    model: str

    def _key(self, rest: str) -> str:
        return f"hr:{{{self.model}}}:{rest}"

    @property
    def submit(self) -> str:
        return self._key("submit")

    @property
    def work(self) -> str:
        return self._key("work")

    @property
    def control(self) -> str:
        return self._key("control")

    @property
    def dead(self) -> str:
        return self._key("dead")

    @property
    def era(self) -> str:
        """A random id that the broker loses with everything else."""
        return self._key("era")

    @property
    def members(self) -> str:
        return self._key("members")

    def presence(self, group: str, consumer: str) -> str:
        """A channel that a group's consumer is subscribed to for as long as it lives."""
        return self._key(f"here:{group}:{consumer}")

    def tokens(self, partition: str) -> str:
        return self._key(f"tokens:{partition}")

    def record(self, request: str) -> str:
        return self._key(f"req:{request}")

    def quota(self, key: str, what: str) -> str:
        return self._key(f"quota:{key}:{what}")

    def ticket(self, hashed: str) -> str:
        return self._key(f"ticket:{hashed}")

    def once(self, tenant: str, what: str) -> str:
        return self._key(f"once:{tenant}:{what}")

    def schemas(self, tenant: str) -> str:
        return self._key(f"schemas:{tenant}")

    def member(self, stage: str, id: str) -> str:
        return self._key(f"member:{stage}:{id}")
