# SPDX-License-Identifier: Apache-2.0
"""models.yaml: the models of one proxy, and how each gets its server."""
