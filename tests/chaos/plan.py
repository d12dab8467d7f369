"""What the client processes are told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Alone(NamedTuple):
    """An answer on an idle server.

    Attributes:
        margins: per token, how far the best logprob was above the second, in nats.
        kept: prompt positions kept, ``[layer][head]``; None where all was.
        prefix, found: the kind of its prefix, and how long that is.
    """

    text: str
    margins: list[float]
    prompt_tokens: int
    policy: str
    config: str
    draft_rows: int
    kept: list[list[list[int]]] | None
    prefix: str
    found: int


@dataclass
class Spec:
    """One prompt, with what is asked of the policy.

    Attributes:
        body: the JSON of ``/generate``.
        messages: the same prompt for chat endpoints.
        alone: the answer given alone, cold; ``resumed`` the one given behind its twin, None where it
            leaves none.
    """

    name: str
    body: dict
    messages: list[dict]
    alone: Alone | None = None
    resumed: Alone | None = None

    @property
    def custom(self) -> dict:
        return self.body["sampling_params"]["custom_params"]

    @property
    def drafts(self) -> bool:
        return bool(self.custom.get("kv_policy_config", {}).get("draft_tokens"))

    @property
    def shows(self) -> bool:
        """Whether there is anything to see."""
        return "image_data" in self.body or self.films

    @property
    def films(self) -> bool:
        return "video_data" in self.body

    @property
    def max_new_tokens(self) -> int:
        return self.body["sampling_params"]["max_new_tokens"]

    def request(self, **sampling) -> dict:
        """The JSON of ``/generate``, to be changed at will."""
        return self.body | {"sampling_params": self.body["sampling_params"] | sampling}


class Malformed(NamedTuple):
    """One request that is wrong.

    Attributes:
        name: ``group/what is wrong``.
        body: as it goes over the wire.
        odd: it may be served as well: strange, not wrong.
        ours: the stock server does not know the field, so it need not refuse it.
    """

    name: str
    body: bytes
    path: str = "/generate"
    headers: dict[str, str] = {"Content-Type": "application/json"}
    method: str = "POST"
    odd: bool = False
    ours: bool = False


class Raw(NamedTuple):
    """Bytes on a socket. ``closes``: our side closes at once; else it waits for the server to."""

    name: str
    data: bytes
    closes: bool = False


@dataclass
class Plan:
    """What all client processes know.

    Attributes:
        clients: requests at once, per process.
        requests: how many each process makes.
        ends: when the last one begins at the latest, in ``time.time()``; None where the number decides.
        deadline: seconds in which every request must end.
    """

    seed: int
    specs: list[Spec]
    malformed: list[Malformed]
    raw: list[Raw]
    clients: int
    requests: int
    ends: float | None
    deadline: float
