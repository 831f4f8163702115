# SPDX-License-Identifier: Apache-2.0
"""Checks in front of vLLM's sleep calls, and one truth behind them.

Stock vLLM pauses the scheduler before anybody looks at the level, takes any tag, notes what sleeps
by what was asked rather than by what happened, and serves from weights that were never loaded. The
wrappers here refuse bad input before anything is touched (``checks``), in the front ends
(``front``, and ``replicas`` for several engines) and in the engine's process (``core``, and
``launched`` where each rank has one), let the engine serve only when it can (``gate``) and only
when the user lets it (``pauses``), answer requests that come too late (``refusals``), and name the
weights that it serves (``version``).
"""
