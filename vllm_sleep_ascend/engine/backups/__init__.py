# SPDX-License-Identifier: Apache-2.0
"""Where the backups of a sleeping engine lie: as a sleep says, or moved by the engine itself."""
