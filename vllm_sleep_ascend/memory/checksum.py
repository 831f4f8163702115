# SPDX-License-Identifier: Apache-2.0
"""Checksums of device memory, computed on the device without copies to the host.

The bytes of an allocation are read as a matrix of 64-bit words. Its row sums and its column sums,
modulo 2**64, are two passes at the speed of the device's memory. Each sum is then mixed with its
position by a bijection of 64-bit numbers, and the results are added up.

Missed are changes that leave every row sum and every column sum unchanged, for which at least four
words in the corners of a rectangle must change by exactly compensating amounts; and any other
change with a probability of 2**-64, that of two equal checksums. A change of one word, or of words
in one row or one column, and exchanged words always change a row or column sum. There is no
protection against deliberate changes.
"""

from collections.abc import Iterable

import torch

_COLUMNS = 4096
_WORD = 8
# Odd constants of splitmix64, as signed 64-bit numbers.
_STEP = 0x9E3779B97F4A7C15 - (1 << 64)
_FACTORS = ((30, 0xBF58476D1CE4E5B9 - (1 << 64)), (27, 0x94D049BB133111EB - (1 << 64)))


def checksums(ranges: Iterable[tuple[int, int]], device: torch.device) -> dict[int, int]:
    """The checksum of each (address, bytes) of mapped memory of ``device``, by address.

    Bytes are a multiple of 2 MiB. Waits for all work on the current stream.
    """
    words = {address: _words(address, size, device) for address, size in ranges}
    if not words:
        return {}
    matrices = [tensor.view(-1, _COLUMNS) for tensor in words.values()]
    lengths = [len(matrix) + _COLUMNS for matrix in matrices]
    sums = torch.empty(sum(lengths), dtype=torch.int64, device=device)
    places = torch.empty_like(sums)
    end = 0
    ends = []
    for matrix, length in zip(matrices, lengths, strict=True):
        rows = len(matrix)
        torch.sum(matrix, dim=1, out=sums[end : end + rows])
        torch.sum(matrix, dim=0, out=sums[end + rows : end + length])
        torch.arange(1, length + 1, out=places[end : end + length])
        end += length
        ends.append(end)
    totals = mix(sums.add_(places.mul_(_STEP))).cumsum(0)
    picked = totals[torch.tensor(ends, device=device) - 1].tolist()
    before = [0, *picked[:-1]]
    return {
        address: (total - previous) % (1 << 64)
        for address, total, previous in zip(words, picked, before, strict=True)
    }


def mix(numbers: torch.Tensor) -> torch.Tensor:
    """A bijection of 64-bit numbers that spreads every bit over all (in place)."""
    for shift, factor in _FACTORS:
        numbers.bitwise_xor_(_shifted(numbers, shift)).mul_(factor)
    return numbers.bitwise_xor_(_shifted(numbers, 31))


def _shifted(numbers: torch.Tensor, places: int) -> torch.Tensor:
    """Logical shift to the right: torch's shift repeats the sign."""
    return (numbers >> places).bitwise_and_((1 << (64 - places)) - 1)


def memory_at(address: int, size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """``size`` bytes of mapped memory of ``device`` as a tensor of raw elements, independent of the
    tensors' formats. It neither copies nor owns the memory."""
    if device.type == "npu":
        import torch_npu

        storage_at = torch_npu._C._construct_storage_from_data_pointer
    else:
        storage_at = torch._C._construct_storage_from_data_pointer
    return torch.empty(0, dtype=dtype, device=device).set_(storage_at(address, device, size))


def _words(address: int, size: int, device: torch.device) -> torch.Tensor:
    if size % (_COLUMNS * _WORD):
        raise ValueError(f"{size} bytes are not a multiple of {_COLUMNS * _WORD}")
    return memory_at(address, size, torch.int64, device)
