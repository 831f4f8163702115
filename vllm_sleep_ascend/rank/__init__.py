# SPDX-License-Identifier: Apache-2.0
"""What a rank (a worker's process) does: sleep and wake with all ranks of its engine, or none."""
