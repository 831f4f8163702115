# SPDX-License-Identifier: Apache-2.0
"""The time of sleep and wake on a link with a given speed, by the formula of cost_model.md.

python benchmarks/cost_model.py --link-gbps 25 --host-gbps 100
"""

import argparse
from dataclasses import dataclass

BYTES_A_PARAMETER = 2
MODELS = {"7B": 7.6, "14B": 14.8, "32B": 32.8, "72B": 72.7, "235B": 235.1}  # 10**9 parameters
NPUS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Host:
    """Speeds in GB/s: of an NPU's link, of the host's memory for all links together, and of pinning
    new host memory with all cores."""

    link: float
    memory: float
    pin: float

    def speed(self, npus: int) -> float:
        """GB/s of one NPU when all NPUs of the host copy at once."""
        return min(self.link, self.memory / npus)

    def copy_s(self, weights_gb: float, npus: int, hosts: int = 1) -> float:
        """Seconds of a later sleep or a wake, in which all NPUs of all hosts copy their shares."""
        return weights_gb / hosts / npus / self.speed(npus)

    def first_sleep_s(self, weights_gb: float, npus: int, hosts: int = 1) -> float:
        """Seconds of the first sleep, in which each host also pins its part of the memory."""
        return self.copy_s(weights_gb, npus, hosts) + weights_gb / hosts / self.pin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--link-gbps", type=float, default=25.0)
    parser.add_argument("--host-gbps", type=float, default=100.0)
    parser.add_argument("--pin-gbps", type=float, default=33.0)
    parser.add_argument("--hosts", type=int, default=1, help="hosts with the same number of NPUs")
    options = parser.parse_args()
    host = Host(options.link_gbps, options.host_gbps, options.pin_gbps)
    heading = "".join(f" {count} NPU{'s' if count > 1 else ''} |" for count in NPUS)
    print(f"| model | weights | first sleep, 1 NPU a host |{heading}")
    print("|---|---|---|" + "---|" * len(NPUS))
    for name, billions in MODELS.items():
        weights = billions * BYTES_A_PARAMETER
        cells = "".join(f" {host.copy_s(weights, count, options.hosts):.2f} s |" for count in NPUS)
        first = host.first_sleep_s(weights, 1, options.hosts)
        print(f"| {name} | {weights:.0f} GB | {first:.2f} s |{cells}")


if __name__ == "__main__":
    main()
