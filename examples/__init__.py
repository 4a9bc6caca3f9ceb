"""Programs of other people with this server behind them; README.md tells how to start each."""
