"""The tests. Imported before torch is, whose threads are to wait as in the command line (d3tom_export/process.py)."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
