# SPDX-License-Identifier: Apache-2.0
"""The log of an experiment: lines for people, and a JSON line for each event, which ``report.py``
reads."""

import json
import time
from typing import Any

from servers import Model


class Recorder:
    """Prints each event when it ends: a line for people, and a JSON line."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.started = time.perf_counter()
        self._emit({"event": "experiment", **settings})

    def event(self, name: str, model: Model, seconds: float, **more: Any) -> None:
        """Record an event that ends now and took ``seconds``."""
        end = time.perf_counter() - self.started
        rates = f", first token {more['first_token_s']:.3f} s" if "first_token_s" in more else ""
        print(f"[{end:8.2f} s] {model.label} {name}: {seconds:.3f} s{rates}")
        times = {"seconds": round(seconds, 4), "end": round(end, 4)}
        self._emit({"event": name, "model": model.label, **times, **more})

    def done(self) -> None:
        total = time.perf_counter() - self.started
        print(f"Done in {total:.1f} s; every prompt gave the text of its model's first.")
        self._emit({"event": "done", "seconds": round(total, 4)})

    def _emit(self, record: dict[str, Any]) -> None:
        print(json.dumps(record), flush=True)
