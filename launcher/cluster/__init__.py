"""Where nodes come from: this machine, or Ray (which only `cluster/ray.py` imports)."""
