"""Stands before the package of that name, which Qlib's Jupyter brings, in the processes of the tests.

Where it can be imported jsonschema does so, for formats of addresses that nothing here has, and it reads a grammar for
two seconds: in each process of Ray, in a notebook's kernel, in nbformat.
"""

raise ImportError("left out in tests: jsonschema does without it")
