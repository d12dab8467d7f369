"""SGLang's frontend language against a server whose requests choose their policy."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import sglang as sgl
from sglang.lang.interpreter import ProgramState
from sglang.lang.ir import SglSamplingParams


@dataclass
class _Chosen(SglSamplingParams):
    custom_params: dict | None = None

    def to_srt_kwargs(self) -> dict:
        return super().to_srt_kwargs() | {"custom_params": self.custom_params}


class Endpoint(sgl.RuntimeEndpoint):
    """A backend whose programs choose their policy, where the server allows it.

    ``sgl.gen``, ``run`` and ``run_batch`` take no ``custom_params``, so the backend adds them::

        server = Endpoint("http://127.0.0.1:30000")
        program.run_batch(many, backend=server.asking(kv_policy="h2o", kv_budget=0.2))

    ``sgl.select`` is left out: it decodes nothing, so no policy touches it.

    Args:
        url: of the server.
        custom_params: what every ``sgl.gen`` asks for; without it, the server's own policy.
        options: of ``sgl.RuntimeEndpoint``.
    """

    def __init__(self, url: str, custom_params: dict | None = None, **options) -> None:
        super().__init__(url, **options)
        self.custom_params = custom_params

    def asking(self, **custom_params) -> Endpoint:
        """The same server, asked for ``custom_params`` and nothing else."""
        other = copy.copy(self)
        other.custom_params = custom_params
        return other

    def generate(self, s, sampling_params: SglSamplingParams):
        return super().generate(s, self._chosen(sampling_params))

    def generate_stream(self, s, sampling_params: SglSamplingParams):
        return super().generate_stream(s, self._chosen(sampling_params))

    def _add_images(self, s, data: dict) -> None:
        """As a data URL: of base64 alone the server takes a JPEG's, which begins with a slash, for a path."""
        super()._add_images(s, data)
        if isinstance(picture := data.get("image_data"), str):
            data["image_data"] = f"data:image/*;base64,{picture}"

    def _chosen(self, params: SglSamplingParams) -> SglSamplingParams:
        return _Chosen(**vars(params), custom_params=self.custom_params) if self.custom_params else params


def ask(s: ProgramState, **custom_params) -> None:
    """Inside a program: what ``s``, and what is forked from it later, asks for from here on.

    Waits until what ``s`` generates is there. The program's backend is an :class:`Endpoint`.
    """
    s.sync()
    s.stream_executor.backend = s.stream_executor.backend.asking(**custom_params)
