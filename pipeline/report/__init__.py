"""The report on a record: its answers, what stands behind them, its plots, its page."""

import logging
import os

# For matplotlib, which the modules here import: a notebook's shell names a way to draw that is the notebook's own, and
# where there is no home folder it would warn of a cache that nobody misses.
os.environ["MPLBACKEND"] = "agg"
logging.getLogger("matplotlib").setLevel(logging.ERROR)
