# SPDX-License-Identifier: Apache-2.0
"""The proxy's two ports, for users and for the operator."""
