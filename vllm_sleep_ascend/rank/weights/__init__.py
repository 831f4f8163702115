# SPDX-License-Identifier: Apache-2.0
"""What a rank knows about its weights, and how it loads them again."""
