"""The report on a record: its answers, what stands behind them, its plots, its page."""
