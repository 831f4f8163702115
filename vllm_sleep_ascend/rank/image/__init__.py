# SPDX-License-Identifier: Apache-2.0
"""A saved image: the weights of an engine as they lie in its memory, from which another engine
starts at the speed of the disk.

A directory has for each rank one file of bytes (``rank-0.weights``) and what they are
(``rank-0.json``), and ``image.json``, which is written last. Saving writes all of it into a folder
beside that directory, and renames the folder once every rank is done.
"""
