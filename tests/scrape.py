"""A server's ``/metrics``."""

from __future__ import annotations

import requests
from prometheus_client.parser import text_string_to_metric_families

from tests.serving import Server


class Scrape:
    """What a server exports at this moment.

    Attributes:
        types, helps: by name of the family, as it stands in the text.
        labels: label names by name of the sample.
    """

    def __init__(self, server: Server) -> None:
        response = requests.get(server.url + "/metrics", timeout=60)
        response.raise_for_status()
        families = [*text_string_to_metric_families(response.text)]
        # The parser takes a counter's suffix off.
        names = [family.name + "_total" * (family.type == "counter") for family in families]
        self.types = {name: family.type for name, family in zip(names, families, strict=True)}
        self.helps = {name: family.documentation for name, family in zip(names, families, strict=True)}
        self._samples = [sample for family in families for sample in family.samples]
        self.labels: dict[str, set[str]] = {}
        for sample in self._samples:
            self.labels.setdefault(sample.name, set()).update(sample.labels)

    def __call__(self, name: str, **labels: str) -> float:
        """Sum of the samples ``name`` with these labels."""
        return sum(
            sample.value
            for sample in self._samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def values(self, name: str, label: str) -> set[str]:
        """Of one label."""
        return {sample.labels[label] for sample in self._samples if sample.name == name}
