# SPDX-License-Identifier: Apache-2.0
"""What sleep and wake would take on a link of a given speed: the formula of cost_model.md.

python benchmarks/cost_model.py --link-gbps 25 --host-gbps 100
"""

import argparse
from dataclasses import dataclass

BYTES_A_PARAMETER = 2
MODELS = {"7B": 7.6, "14B": 14.8, "32B": 32.8, "72B": 72.7, "235B": 235.1}  # 10**9 parameters
NPUS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Host:
    """Speeds in GB/s: of one NPU's link, of the host's memory for all links together, and of the
    host when it pins new memory, with all its cores."""

    link: float
    memory: float
    pin: float

    def speed(self, npus: int) -> float:
        """GB/s of one NPU when all NPUs of the host copy at once."""
        return min(self.link, self.memory / npus)

    def copy_s(self, weights_gb: float, npus: int, hosts: int = 1) -> float:
        """A later sleep, or a wake: every NPU of every host moves its share, all at once."""
        return weights_gb / hosts / npus / self.speed(npus)

    def first_sleep_s(self, weights_gb: float, npus: int, hosts: int = 1) -> float:
        """Each host also pins its part, with little of it beside the copies."""
        return self.copy_s(weights_gb, npus, hosts) + weights_gb / hosts / self.pin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--link-gbps", type=float, default=25.0)
    parser.add_argument("--host-gbps", type=float, default=100.0)
    parser.add_argument("--pin-gbps", type=float, default=33.0)
    parser.add_argument("--hosts", type=int, default=1, help="with as many NPUs each")
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
