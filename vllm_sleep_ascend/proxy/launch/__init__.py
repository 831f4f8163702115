# SPDX-License-Identifier: Apache-2.0
"""Processes of servers that the proxy starts: their groups, ports, logs, and records of them."""
