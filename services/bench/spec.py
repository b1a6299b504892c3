"""What a run is: one frozen value, made from the command line and sent to every client process as JSON. Pure."""

from dataclasses import dataclass
from typing import Literal

Mode = Literal["same", "closed", "open", "trace"]
Endpoint = Literal["completions", "chat"]


@dataclass(frozen=True, slots=True)
class Spec:
    """Lengths are in tokens, times in seconds. Counts are for the whole run, however many client processes share it."""

    mode: Mode
    url: str
    model: str | None = None
    api_key: str | None = None
    endpoint: Endpoint = "completions"
    timeout: float = 600.0
    body: dict[str, object] | None = None  # merged over what we would send: temperature, logit_bias, ...
    ignore_eos: bool = True
    fresh: bool = False  # a connection for each request

    prompts: str | None = None  # a file, one prompt per line; None: synthetic
    text: bool = False  # synthetic prompts as words; token ids otherwise (chat always has words)
    vocab: tuple[int, int] = (1000, 30000)
    input_tokens: int = 128
    common_tokens: int = 0  # of them
    output_tokens: int = 128

    users: int = 1
    requests: int | None = None
    duration: float | None = None  # nothing is sent later than this; what is under way is waited for
    rate: float = 1.0
    max_inflight: int = 1024

    trace: str | None = None
    input_scale: float = 1.0
    output_scale: float = 1.0
    time_scale: float = 1.0
    max_input: int | None = None
    max_output: int | None = None

    warmup: int = 0
    processes: int = 1
    seed: int = 0
    slo_ttft: float = 2.0
    slo_tpot: float = 0.05

    @property
    def wordy(self) -> bool:
        return self.text or self.endpoint == "chat"

    @property
    def rounds(self) -> int:
        """How often all clients wait for each other before they start: only the same question has more than one."""
        if self.mode != "same":
            return 1
        return -(-(self.requests or self.users) // self.users)


def spread(total: int, process: int, processes: int) -> int:
    """This process's share of `total` things, when thing i belongs to process i mod `processes`."""
    return len(range(process, total, processes))
