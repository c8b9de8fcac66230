# SPDX-License-Identifier: Apache-2.0
"""loaded.py DIRECTORY: runs the program of the benchmark with the packages in this directory, and prints which files of it are loaded."""

import os
import sys

directory = os.path.join(os.path.realpath(sys.argv[1]), "")
sys.dont_write_bytecode = True
sys.path.insert(0, directory)

import matplotlib.pyplot, networkx, numpy, pandas, sympy  # noqa: E401, E402, F401

files = {file for module in list(sys.modules.values()) for file in [getattr(module, "__cached__", None) or getattr(module, "__file__", None)] if file}
with open("/proc/self/maps") as maps:
    files |= {line.split(maxsplit=5)[5].strip() for line in maps if "/" in line}
for file in sorted(files):
    if file.startswith(directory):
        print(file.removeprefix(directory))
