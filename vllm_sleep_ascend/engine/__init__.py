# SPDX-License-Identifier: Apache-2.0
"""The engine's process: our wrappers of vLLM's EngineCore and its executors.

Stock vLLM pauses the scheduler before it checks the level, accepts any tag, records what was
requested as sleeping instead of what really sleeps, and serves from weights that were never loaded.
Here bad input is refused before anything is touched (``checks``), calls are refused or followed
(``core``, and ``launched`` where each rank has an engine), every rank's answer is read
(``rank_answers``), the engine serves only when it can (``serving_gate``) and only when the user
lets it (``pauses``), requests that come too late are answered (``refusals``), and the weights that
it serves have their version (``weight_version``). What is kept of an engine is in ``state``.
"""
