# SPDX-License-Identifier: Apache-2.0
"""pyACL, as far as it is simulated: `acl.rt` over the toolkit's libascendcl.so."""

from acl import rt

__all__ = ["rt"]
