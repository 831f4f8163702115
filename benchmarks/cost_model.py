# SPDX-License-Identifier: Apache-2.0
"""The time of sleep and wake on a link with a given speed, by the formula of cost_model.md.

python benchmarks/cost_model.py --link-gbps 25 --host-gbps 100
python benchmarks/cost_model.py --tiers  # host memory or disk: the table of docs/guide.md
"""

import argparse
from dataclasses import dataclass

BYTES_A_PARAMETER = 2
MODELS = {"7B": 7.6, "14B": 14.8, "32B": 32.8, "72B": 72.7, "235B": 235.1}  # 10**9 parameters
NPUS = (1, 2, 4, 8)
SERVED_BY = {"7B": 1, "14B": 1, "32B": 2, "72B": 4, "235B": 8}  # NPUs of one host
LINKS, DISKS = (12.5, 25.0, 50.0), (2.5, 7.0, 14.0)  # GB/s


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

    def disk_s(self, weights_gb: float, npus: int, disk: float) -> float:
        """Seconds of a sleep to a disk of the host, or a wake from it, all of it written or read:
        the disk, with ``disk`` GB/s in that direction, works while the links copy."""
        return max(self.copy_s(weights_gb, npus), weights_gb / disk)


def tiers(memory: float) -> str:
    """The table of seconds by the place of the backup."""
    hosts = (f"host memory, link {speed:g} GB/s" for speed in LINKS)
    rows = [["model", "weights", "NPUs", *hosts, *(f"disk {speed:g} GB/s" for speed in DISKS)]]
    for name, billions in MODELS.items():
        weights, npus = billions * BYTES_A_PARAMETER, SERVED_BY[name]
        seconds = [Host(link, memory, 1).copy_s(weights, npus) for link in LINKS]
        middle = Host(LINKS[1], memory, 1)
        seconds += [middle.disk_s(weights, npus, disk) for disk in DISKS]
        rows.append([name, f"{weights:.0f} GB", str(npus), *(f"{each:.1f} s" for each in seconds)])
    heading, *lines = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([heading, "|" + "---|" * len(rows[0]), *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--link-gbps", type=float, default=25.0)
    parser.add_argument("--host-gbps", type=float, default=100.0)
    parser.add_argument("--pin-gbps", type=float, default=33.0)
    parser.add_argument("--hosts", type=int, default=1, help="hosts with the same number of NPUs")
    parser.add_argument("--tiers", action="store_true", help="the table of host memory and disk")
    options = parser.parse_args()
    if options.tiers:
        print(tiers(options.host_gbps))
        return
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
